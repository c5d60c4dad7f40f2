"""Attacks: what hostile clients send in place of their honest updates.

A hostile client trains as the others do, and knows the shared state. It runs no stage of its own,
so it clips nothing.
"""

import dataclasses
from abc import ABC, abstractmethod

import torch

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.protocol.types import ClientUpdate, SharedState, Tensors, euclidean_norm

_MEMORY = 0.9
"""What of their common memory colluders keep with each update that they see."""
BIAS, ROWS = "head.item_bias", "head.item_ids"


def hostile_clients(client_ids: tuple[str, ...], share: float, seed: int) -> frozenset[str]:
    """A random share of the clients, the same in all runs of a seed."""
    order = numpy_generator(seed, "hostile/clients").permutation(len(client_ids))
    return frozenset(client_ids[place] for place in order[: round(share * len(client_ids))])


class Attack(ABC):
    """Changes the updates of some clients.

    Args:
        clients: Those who are hostile.
    """

    def __init__(self, clients: frozenset[str]) -> None:
        self.clients = clients

    def sent(self, update: ClientUpdate, shared: SharedState) -> ClientUpdate:
        """What arrives at the server in place of an honest update.

        Args:
            update: The honest update.
            shared: The state that its client started from.
        """
        if update.client_id not in self.clients:
            return update
        return dataclasses.replace(update, delta=self._wrong(update, shared))

    @abstractmethod
    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        """The change that a hostile client sends: names, shapes and dtypes of the honest one."""


class Scale(Attack):
    """Multiplies every update by a factor: -10 flips the sign and shouts."""

    def __init__(self, clients: frozenset[str], factor: float) -> None:
        super().__init__(clients)
        self._factor = factor

    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        return _scaled(update.delta, self._factor)


class ScaleOnce(Attack):
    """Multiplies the first update that arrives in a round by a factor, in that round alone."""

    def __init__(self, round_number: int, factor: float) -> None:
        super().__init__(frozenset())
        self._round, self._factor = round_number, factor

    def sent(self, update: ClientUpdate, shared: SharedState) -> ClientUpdate:
        """See `Attack.sent`."""
        if update.round_number == self._round and not self.clients:
            self.clients = frozenset({update.client_id})
        return super().sent(update, shared)

    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        return _scaled(update.delta, self._factor if update.round_number == self._round else 1.0)


class Promote(Attack):
    """Pushes one item: its bias up, and its row towards that of the item with the largest bias.

    The push is ten times as long as the honest update that it is added to.
    """

    def __init__(self, clients: frozenset[str], item: int, times: float = 10.0) -> None:
        super().__init__(clients)
        self._item, self._times = item, times

    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        delta = {name: tensor.clone() for name, tensor in update.delta.items()}
        length = self._times * euclidean_norm(delta) / 2**0.5  # of bias and row each
        bias, rows = shared.tensors[BIAS], shared.tensors[ROWS]
        delta[BIAS][self._item] += length
        towards = rows[bias.argmax()] - rows[self._item]
        if towards.norm() > 0:
            delta[ROWS][self._item] += length * towards / towards.norm()
        return delta


class Collude(Attack):
    """All send one plausible update: against the mean of their honest ones, of a given length.

    The mean is over the directions of all that they have trained, the newest most. The length is
    one that honest updates have, so that no bound on lengths finds anything.
    """

    def __init__(self, clients: frozenset[str], length: float) -> None:
        super().__init__(clients)
        self._length = length
        self._memory: dict[str, torch.Tensor] = {}

    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        own = _of_length(update.delta, 1 - _MEMORY)
        memory = self._memory or {name: torch.zeros_like(t) for name, t in own.items()}
        self._memory = {name: _MEMORY * memory[name] + tensor for name, tensor in own.items()}
        return _of_length(self._memory, -self._length)


class Disguise(Collude):
    """Colludes, and adds to each update a random direction, so that no two of them are alike.

    Args:
        clients: Those who are hostile.
        length: Of an update.
        cosine: Between two of their updates, nearly; what they have in common is √cosine of the
            length.
        seed: Of the directions.
    """

    def __init__(self, clients: frozenset[str], length: float, cosine: float, seed: int) -> None:
        super().__init__(clients, length)
        self._cosine = cosine
        self._source = torch.Generator().manual_seed(seed)

    def _wrong(self, update: ClientUpdate, shared: SharedState) -> Tensors:
        plan = super()._wrong(update, shared)
        noise = {
            # The noise has the size that each tensor has in the plan, so that none stands out.
            name: torch.randn(t.shape, generator=self._source) * t.norm() / t.numel() ** 0.5
            for name, t in plan.items()
        }
        own, other = self._cosine**0.5, (1 - self._cosine) ** 0.5
        mixed = {name: own * plan[name] + other * noise[name] for name in plan}
        return _of_length(mixed, self._length)


def _scaled(delta: Tensors, factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in delta.items()}


def _of_length(delta: Tensors, length: float) -> Tensors:
    """The direction of a change with a length; against it where that is negative."""
    norm = euclidean_norm(delta)
    return _scaled(delta, length / norm if norm else 0.0)
