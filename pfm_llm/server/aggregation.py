"""Streamed aggregation of updates, and the server's step.

Nothing here knows of clients' data or private states: updates come in, a mean goes out, and
`ServerStep` turns the mean into the next shared state.
"""

import math
from dataclasses import dataclass
from typing import Self, TypedDict

import torch

from pfm_llm.base.errors import ContractError, TrainingError
from pfm_llm.config.choices import LearningRateSchedule, ServerOptimizer, Weighting
from pfm_llm.config.schema import ServerConfig
from pfm_llm.config.settle import known
from pfm_llm.protocol.types import ClientUpdate, SharedState, Tensors

TASTE_RATES = {
    "basis.taste.like.items": 1e-2,
    "basis.taste.like.": 3e-3,  # overfits sooner than the rest
    "basis.taste.next_item.read_": 3e-2,  # embeddings, one row an item
    "basis.taste.": 1e-2,
}
"""Learning rates of the basis of taste vectors, by prefix of a name; the first match counts."""

_BETA2, _EPS = 0.99, 1e-8
"""β₂ and ε of `ServerStep`'s ``fedadam``."""

_MAX_RATE = 1e30
"""Beyond it a learning rate, divided by Adam's bias correction, may not fit into float32."""


class SumPayload(TypedDict):
    """A `RunningSum` as plain data, to cross a process boundary."""

    tensors: dict[str, torch.Tensor]
    total_weight: float
    weighted_loss: float
    num_examples: int
    client_ids: list[str]
    refusals: list[str]


def update_weight(weighting: Weighting, num_examples: int) -> float:
    """How much an update counts: 1 (``uniform``) or its number of examples."""
    return 1.0 if weighting is Weighting.UNIFORM else float(num_examples)


class RunningSum:
    """The weighted sum of the updates seen so far; no update is kept.

    Sums are held in float64: float32 values then add up without rounding that a float32 mean
    could show, in whatever order clients, chunks and processes come. Equal updates aggregate to
    exactly themselves.
    """

    def __init__(self) -> None:
        """Start an empty sum."""
        self._tensors: dict[str, torch.Tensor] = {}
        self._total_weight = 0.0
        self._weighted_loss = 0.0
        self._num_examples = 0
        self._client_ids: list[str] = []
        self._refusals: list[str] = []

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Add one update.

        Args:
            update: Already checked against the contract; its tensors are not kept.
            weight: How much it counts, above 0; see `update_weight`.

        Raises:
            ContractError: The client is in the sum already, the tensors differ in name or shape
                from those before, or the weight is not a positive number. The sum is unchanged.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ContractError(
                f"client {update.client_id!r}: weight {weight} is not a positive number"
            )
        self._check_joinable([update.client_id], update.delta)
        self._accumulate(update.delta, weight)
        self._total_weight += weight
        self._weighted_loss += weight * update.loss
        self._num_examples += update.num_examples
        self._client_ids.append(update.client_id)

    def refuse(self, reason: str) -> None:
        """Count an update that was refused; ``reason`` names the client."""
        self._refusals.append(reason)

    def merge(self, other: "RunningSum") -> None:
        """Add another sum, of other clients of the same round.

        Raises:
            ContractError: A client is in both, or the tensors differ in name or shape. The sum
                is unchanged.
        """
        if other._client_ids:
            self._check_joinable(other._client_ids, other._tensors)
            self._accumulate(other._tensors, 1.0)
        self._total_weight += other._total_weight
        self._weighted_loss += other._weighted_loss
        self._num_examples += other._num_examples
        self._client_ids += other._client_ids
        self._refusals += other._refusals

    def mean(self) -> dict[str, torch.Tensor]:
        """The weighted mean: name to float32 CPU tensor.

        Raises:
            TrainingError: Nothing was added.
        """
        if not self._client_ids:
            raise TrainingError("no update was accepted in this round: there is no mean")
        return {
            name: (total / self._total_weight).to(torch.float32)
            for name, total in self._tensors.items()
        }

    @property
    def num_updates(self) -> int:
        """How many updates were added."""
        return len(self._client_ids)

    @property
    def total_weight(self) -> float:
        """The sum of their weights."""
        return self._total_weight

    @property
    def num_examples(self) -> int:
        """The sum of their examples."""
        return self._num_examples

    @property
    def loss(self) -> float | None:
        """Their weighted mean loss (nats); None when nothing was added."""
        return self._weighted_loss / self._total_weight if self._client_ids else None

    @property
    def client_ids(self) -> tuple[str, ...]:
        """Whose updates were added, in order."""
        return tuple(self._client_ids)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why updates were refused, one reason for each."""
        return tuple(self._refusals)

    def to_payload(self) -> SumPayload:
        """The sum as plain data. The tensors (float64) are shared with this sum, not copied."""
        return SumPayload(
            tensors=dict(self._tensors),
            total_weight=self._total_weight,
            weighted_loss=self._weighted_loss,
            num_examples=self._num_examples,
            client_ids=list(self._client_ids),
            refusals=list(self._refusals),
        )

    @classmethod
    def from_payload(cls, payload: SumPayload) -> Self:
        """The sum that `to_payload` described; adding to it leaves the payload unchanged."""
        result = cls()
        result._tensors = {name: t.clone() for name, t in payload["tensors"].items()}
        result._total_weight = payload["total_weight"]
        result._weighted_loss = payload["weighted_loss"]
        result._num_examples = payload["num_examples"]
        result._client_ids = list(payload["client_ids"])
        result._refusals = list(payload["refusals"])
        return result

    def _check_joinable(self, client_ids: list[str], tensors: Tensors) -> None:
        twice = set(client_ids).intersection(self._client_ids)
        if twice:
            raise ContractError(f"client {min(twice)!r} would be counted twice in this round")
        if self._client_ids:
            _check_same_tensors(tensors, self._tensors, client_ids[0])

    def _accumulate(self, tensors: Tensors, weight: float) -> None:
        if not self._tensors:
            self._tensors = {
                name: torch.zeros(tensor.shape, dtype=torch.float64)
                for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            self._tensors[name].add_(tensor.detach().cpu(), alpha=weight)


@dataclass(frozen=True)
class OptimizerState:
    """What the server's optimizer remembers.

    Attributes:
        step: How many steps were taken.
        first: Momentum of ``fedavgm`` and ``fedadam``, float32, named as the shared tensors;
            empty for ``average``.
        second: Mean of squares of ``fedadam``, likewise; empty for the others.
    """

    step: int
    first: Tensors
    second: Tensors


@dataclass(frozen=True)
class ServerStep:
    """The server's optimizer: state in, state out.

    With Δ the aggregated update, η the group's learning rate times `lr_factor`:

    - ``average``: w ← w + η Δ, η = `lr_factor` times ``lr_scale``: ``lr_*`` do not apply. With a
      constant schedule and ``lr_scale: 1`` that is FedAvg (arXiv 1602.05629, algorithm 1).
    - ``fedavgm``: v ← momentum · v + Δ; w ← w + η v (arXiv 1909.06335).
    - ``fedadam``: m ← momentum · m + (1 - momentum) Δ; v ← β₂ v + (1 - β₂) Δ²;
      w ← w + η m̂ / (√v̂ + ε) (arXiv 2003.00295, algorithm 2). Unlike there, m̂ and v̂ are
      corrected for their start at zero, as in Adam, so that the first rounds take whole steps:
      with Δ = -gradient this is Adam.

    ``weight_decay`` is decoupled, w ← (1 - η · weight_decay) w before the step, and applies to
    every tensor.

    Attributes:
        config: Optimizer and learning rates.
        num_rounds: Over how many rounds the schedule runs.
    """

    config: ServerConfig
    num_rounds: int

    def initial_state(self, shared: SharedState) -> OptimizerState:
        """The state before the first step: zeros where the optimizer needs moments."""
        optimizer = self.config.optimizer
        return OptimizerState(
            step=0,
            first={} if optimizer is ServerOptimizer.AVERAGE else _zeros(shared.tensors),
            second=_zeros(shared.tensors) if optimizer is ServerOptimizer.FEDADAM else {},
        )

    def lr_factor(self, round_number: int) -> float:
        """The schedule's factor in (0, 1] for a round, from 1.

        A linear warm-up over ``warmup_rounds``, r / (warmup_rounds + 1); then 1, or half a
        cosine from 1 that would reach 0 in the round after the last.
        """
        warmup = known(self.config.warmup_rounds)
        if round_number <= warmup:
            return round_number / (warmup + 1)
        if self.config.lr_schedule is LearningRateSchedule.CONSTANT:
            return 1.0
        progress = (round_number - 1 - warmup) / (self.num_rounds - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def learning_rate(self, name: str) -> float:
        """The learning rate of a shared tensor's group, before the schedule.

        Raises:
            ContractError: The name belongs to no group.
        """
        groups = {
            "lora.": self.config.lr_lora,
            **TASTE_RATES,
            "basis.": self.config.lr_lora,
            "head.item_ids": self.config.lr_item_ids,
            "head.item_bias": self.config.lr_item_bias,
            "head.like_bias": self.config.lr_item_bias,
            "head.like_ids": self.config.lr_item_bias,
            "head.": self.config.lr_head,  # the first match counts: special cases stand before
        }
        for prefix, rate in groups.items():
            if name.startswith(prefix):
                if self.config.optimizer is ServerOptimizer.AVERAGE:
                    return self.config.lr_scale
                # A basis has a loss of its own: what suits the shared part does not suit it.
                return rate if prefix.startswith("basis.taste.") else rate * self.config.lr_scale
        raise ContractError(f"{name!r} is no shared tensor: it has no learning rate")

    def step(
        self, shared: SharedState, aggregate: Tensors, state: OptimizerState, round_number: int
    ) -> tuple[SharedState, OptimizerState]:
        """Take one step; the arguments are left as they are.

        Args:
            shared: The state that the clients started from.
            aggregate: Mean update, the same names and shapes.
            state: What the optimizer remembers.
            round_number: The round, from 1, for the schedule.

        Returns:
            The next shared state and optimizer state.

        Raises:
            ContractError: ``aggregate`` does not fit ``shared``.
            TrainingError: A result is not finite.
        """
        _check_same_tensors(aggregate, shared.tensors, "the aggregate")
        first, second = self._moments(aggregate, state)
        factor, count = self.lr_factor(round_number), state.step + 1
        tensors = {}
        for name, tensor in shared.tensors.items():
            rate = self._rate(name, factor)
            moved = tensor * (1 - rate * self.config.weight_decay)
            if name in second:
                correction1 = 1 - self.config.momentum**count
                correction2 = 1 - _BETA2**count
                root = (second[name].sqrt() / math.sqrt(correction2)).add_(_EPS)
                moved.addcdiv_(first[name], root, value=rate / correction1)
            else:
                moved.add_(first.get(name, aggregate[name]), alpha=rate)
            tensors[name] = moved
        for results in (tensors, first, second):
            _check_finite(results, round_number)
        return SharedState(tensors), OptimizerState(count, first, second)

    def _rate(self, name: str, factor: float) -> float:
        rate = factor * self.learning_rate(name)
        if rate > _MAX_RATE:
            raise TrainingError(
                f"the server's learning rate of {name} is {rate:g}, beyond float32; "
                "lower the learning rates in federation.server"
            )
        return rate

    def _moments(
        self, aggregate: Tensors, state: OptimizerState
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        momentum = self.config.momentum
        adam = self.config.optimizer is ServerOptimizer.FEDADAM
        gain = 1 - momentum if adam else 1.0
        first = {
            name: (moment * momentum).add_(aggregate[name], alpha=gain)
            for name, moment in state.first.items()
        }
        second = {
            name: (moment * _BETA2).addcmul_(aggregate[name], aggregate[name], value=1 - _BETA2)
            for name, moment in state.second.items()
        }
        return first, second


def _zeros(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _check_same_tensors(tensors: Tensors, expected: Tensors, whose: str) -> None:
    if tensors.keys() != expected.keys():
        name = min(tensors.keys() ^ expected.keys())
        problem = "lacks" if name in expected else "has the unexpected tensor"
        raise ContractError(f"{whose} {problem} {name!r}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ContractError(
                f"{whose}: {name} has shape {list(tensors[name].shape)}, "
                f"must be {list(tensor.shape)}"
            )


def _check_finite(tensors: Tensors, round_number: int) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"the server's step of round {round_number} made {name} not finite; "
                "lower the learning rates in federation.server"
            )
