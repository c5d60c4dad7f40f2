"""Private gradient steps from what is read off a history, guarded by the user's own past.

A LoRA that is read off the history has the coefficients c_u before any step. At home the client can
change them by d_u, for which it takes steps of plain gradient descent from zero::

    d <- d - rate * dL_u(d)/dd

L_u(d) is the mean loss of the next item on the user's past, in the private term of the training:
each position has the coefficients that are read off its own past, changed by d. So d_u is what the
reading misses of this user again and again, and the user is served with c_u + d_u. The factors of
the LoRA, all else that is shared, and the user embedding are fixed.

The *guard* is prequential (Dawid 1984). Steps are first taken on the earlier part of the history
alone, and are kept only if they lower the loss of the later part, which they have not seen. They
are then taken again on the whole history; otherwise the user keeps c_u.
"""

from collections.abc import Sequence

import torch

from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.local_steps import StackedOptimizer
from pfm_llm.config.choices import LocalOptimizer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.history import History
from pfm_llm.model.batches import collate, stacked_tensors
from pfm_llm.model.cohort import CohortModel, PrivateLosses
from pfm_llm.protocol.types import SharedState, Tensors

Owned = tuple[str, History]
"""A client's id and its history."""
RATE = 0.1
"""The learning rate; no rate that was tried on validation adds anything (docs/log)."""
EARLIER = 0.75
"""Share of a history that teaches the steps before the guard."""
LEAST_EVENTS = 8
"""A shorter history keeps what was read."""


class PrivateSteps:
    """Takes private steps for many clients in one pass, each on its own history.

    Args:
        config: The experiment.
        model: The many-clients model.
        histories: The clients' data.
    """

    def __init__(
        self, config: ExperimentConfig, model: CohortModel, histories: ClientHistories
    ) -> None:
        self._private = config.adapters.private
        part = model.objective.private
        self._zeros = {name: part.initial("")[name] for name in part.coefficients}
        self._model = model
        self._histories = histories

    def __call__(
        self,
        chunk: Sequence[str],
        histories: Sequence[History],
        shared: SharedState,
        read: Tensors,
    ) -> dict[str, torch.Tensor]:
        """Private tensors [C, ...] after the steps.

        Args:
            chunk: C client ids.
            histories: The history of each, off which its tensors were read.
            shared: The shared state.
            read: These tensors, stacked.
        """
        clients = list(zip(chunk, histories, strict=True))
        able = [c for c, history in enumerate(histories) if len(history) >= LEAST_EVENTS]
        helped = self._helped([clients[c] for c in able], shared)
        rows = [c for c, is_helped in zip(able, helped, strict=True) if is_helped]
        found = dict(read)
        if not rows:
            return found
        changes = self._changes([clients[c] for c in rows], shared)
        for name, change in changes.items():
            found[name] = read[name].index_add(0, torch.tensor(rows, device=change.device), change)
        return found

    def _helped(self, clients: Sequence[Owned], shared: SharedState) -> list[bool]:
        """Whether steps on the earlier part of each history lower the loss of the later part."""
        if not clients:
            return []
        starts = [int(EARLIER * len(history)) for _, history in clients]
        parts = zip(clients, starts, strict=True)
        earlier = [(client_id, history[:start]) for (client_id, history), start in parts]
        changes = self._changes(earlier, shared)
        losses = self._losses(clients, starts, shared)
        with torch.no_grad():
            stepped, read = losses(changes), losses({})
        return [bool(one < other) for one, other in zip(stepped, read, strict=True)]

    def _changes(self, clients: Sequence[Owned], shared: SharedState) -> dict[str, torch.Tensor]:
        """The changes of the coefficients of each client, [C, n], after steps on its history."""
        losses = self._losses(clients, [0] * len(clients), shared)
        optimizer = StackedOptimizer(LocalOptimizer.SGD, RATE)
        changes = {
            name: zero.to(self._model.item_texts.device).repeat(len(clients), 1).requires_grad_()
            for name, zero in self._zeros.items()
        }
        for _ in range(self._private.steps):
            total = torch.stack(losses(changes)).sum()
            changes = optimizer.step(changes, torch.autograd.grad(total, list(changes.values())))
        return {name: change.detach() for name, change in changes.items()}

    def _losses(
        self, clients: Sequence[Owned], known: Sequence[int], shared: SharedState
    ) -> PrivateLosses:
        """The losses of the items of each history but its first ``known`` ones."""
        parts = zip(clients, known, strict=True)
        read = [self._histories.newest(*client, start) for client, start in parts]
        batch = collate([windows for windows, _ in read], [states for _, states in read])
        device = self._model.item_texts.device
        stacked = stacked_tensors(shared.tensors, len(clients), device)
        return self._model.private_losses(batch, stacked)
