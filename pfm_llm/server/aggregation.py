"""Aggregation of the updates of a round into one update.

This module handles no data of clients and no private states.
"""

import abc
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from pfm_llm.base.errors import ContractError, TrainingError
from pfm_llm.config.choices import Weighting
from pfm_llm.config.schema import ServerConfig
from pfm_llm.protocol.types import ClientUpdate, NodeUpdate, Refusal, Tensors

_LEVELS = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
_LEVEL_NAMES = ("p10", "median", "p90", "largest")


@dataclass
class Tally:
    """The clients of the updates in an aggregator, and sums over them.

    Attributes:
        client_ids: The clients whose updates were added, in order; with a sum of a node all that
            were asked for it.
        num_updates: How many updates were added; a sum counts its clients.
        refusals: What was wrong with each refused update; the texts name clients.
        reasons: How many were refused for each `Refusal`.
        total_weight: The sum of the weights of the added updates.
        weighted_loss: The sum of their losses (nats), each times its weight.
        num_examples: The sum of their examples.
        noted: Name of a stage to the number that it noted for each update, in order.
        norms: The Euclidean norm of each update that fits the contract, as it arrived. It is here
            also if the update was then refused for its length.
        sizes: The sizes of each added update; see `NormBound`.
        clipped: How many of the added updates `NormBound` scaled down.
    """

    client_ids: list[str] = field(default_factory=list)
    num_updates: int = 0
    refusals: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    total_weight: float = 0.0
    weighted_loss: float = 0.0
    num_examples: int = 0
    noted: dict[str, list[float]] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    sizes: list[torch.Tensor] = field(default_factory=list)
    clipped: int = 0

    @property
    def loss(self) -> float | None:
        """Their weighted mean loss (nats); None when nothing was added."""
        return self.weighted_loss / self.total_weight if self.num_updates else None

    @property
    def norm_quantiles(self) -> dict[str, float]:
        """Tenth, half and nine tenths of the norms lie below these; and the largest norm.

        Neighbours are interpolated linearly. Empty where no norm is known.
        """
        if not self.norms:
            return {}
        found = torch.tensor(self.norms, dtype=torch.float64).quantile(_LEVELS)
        return dict(zip(_LEVEL_NAMES, found.tolist(), strict=True))

    def note(self, noted: Mapping[str, float]) -> None:
        """Keep the numbers that the stages noted for one update."""
        for name, figure in noted.items():
            self.noted.setdefault(name, []).append(figure)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.client_ids += other.client_ids
        self.num_updates += other.num_updates
        self.refusals += other.refusals
        self.reasons += other.reasons
        self.total_weight += other.total_weight
        self.weighted_loss += other.weighted_loss
        self.num_examples += other.num_examples
        for name, figures in other.noted.items():
            self.noted.setdefault(name, []).extend(figures)
        self.norms += other.norms
        self.sizes += other.sizes
        self.clipped += other.clipped


def update_weight(weighting: Weighting, num_examples: int) -> float:
    """How much an update counts: 1 (``uniform``) or its number of examples."""
    return 1.0 if weighting is Weighting.UNIFORM else float(num_examples)


class Aggregator(abc.ABC):
    """Collects the updates of a chunk of clients or of a round and combines them into one update.

    A subclass defines how an update is stored (`_take`) and how the stored updates are combined
    (`_combine`). This class has the checks and counts. The result must not depend on the order of
    clients, chunks and processes, and equal updates must aggregate to themselves. An aggregator can
    be pickled, to be merged in another process.

    Attributes:
        tally: The clients and counts of the updates.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.tally = Tally()
        # Sums or single updates, as the subclass needs; all have names and shapes of an update.
        self._held: list[dict[str, torch.Tensor]] = []

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """An empty aggregator with the settings of a server."""
        return cls()

    @abc.abstractmethod
    def _take(self, tensors: Tensors, weight: float) -> None:
        """Store one update, or one stored entry of another aggregator of this kind (weight 1).

        Args:
            tensors: Names and shapes are those of the stored tensors; do not keep or change them.
            weight: The weight of the update, above 0.
        """

    @abc.abstractmethod
    def _combine(self) -> dict[str, torch.Tensor]:
        """The aggregate of the stored updates: name to float32 CPU tensor of an update's shape."""

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Add one update.

        Args:
            update: Already checked against the contract; its tensors are not kept.
            weight: Its weight, above 0; see `update_weight`.

        Raises:
            ContractError: The client was added already, the tensors differ in name or shape
                from those before, or the weight is not a positive number. Nothing is changed.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ContractError(
                f"client {update.client_id!r}: weight {weight} is not a positive number"
            )
        self._check_joinable([update.client_id], update.delta)
        self._take(update.delta, weight)
        own = Tally(
            client_ids=[update.client_id],
            num_updates=1,
            total_weight=weight,
            weighted_loss=weight * update.loss,
            num_examples=update.num_examples,
        )
        self.tally.merge(own)

    def refuse(self, problem: str, reason: str = Refusal.NO_ANSWER) -> None:
        """Count a client that gave no usable update.

        Args:
            problem: What was wrong; names the client, and is shown to the operator alone.
            reason: Its kind, for the public record of the round.
        """
        self.tally.refusals.append(problem)
        self.tally.reasons[str(reason)] += 1

    def merge(self, other: Self) -> None:
        """Add the updates of another aggregator, from other clients of the same round.

        Raises:
            ContractError: A client is in both, or the tensors differ in name or shape. Nothing
                is changed.
        """
        if other._held:
            self._check_joinable(other.tally.client_ids, other._held[0])
            for tensors in other._held:
                self._take(tensors, 1.0)
        self.tally.merge(other.tally)

    def result(self) -> dict[str, torch.Tensor]:
        """The aggregate: name to float32 CPU tensor of an update's shape.

        Raises:
            TrainingError: Nothing was added.
        """
        if not self.tally.num_updates:
            raise TrainingError("no update was accepted in this round: nothing can be aggregated")
        return self._combine()

    def _check_joinable(self, client_ids: list[str], tensors: Tensors) -> None:
        twice = set(client_ids).intersection(self.tally.client_ids)
        if twice:
            raise ContractError(
                f"client {min(twice)!r:.80} would be counted twice in this round", Refusal.TWICE
            )
        if self._held:
            check_same_tensors(tensors, self._held[0], client_ids[0])


class WeightedMean(Aggregator):
    """The weighted mean of the updates, streamed: no update is kept.

        Δ̄ = Σ_u w_u Δ_u / Σ_u w_u        (FedAvg, arXiv 1602.05629, algorithm 1)

    The sums are float64. Rounding is then too small to change a float32 mean, whatever the order of
    clients, chunks and processes. Equal updates aggregate to exactly themselves. A single client
    can move the mean arbitrarily far.
    """

    def add_sum(self, update: NodeUpdate, weight: float, client_ids: Sequence[str]) -> None:
        """Add the sum of a node.

        Args:
            update: Already checked against the contract.
            weight: The sum of the weights of its clients, above 0.
            client_ids: The clients that were asked; at least as many as are in the sum.

        Raises:
            ContractError: A client was added already, or the tensors differ from those before.
                Nothing is changed.
        """
        self._check_joinable(list(client_ids), update.delta)
        self._take(update.delta, 1.0)
        own = Tally(
            client_ids=list(client_ids),
            num_updates=update.num_clients,
            total_weight=weight,
            weighted_loss=weight * update.loss,
            num_examples=update.num_examples,
        )
        self.tally.merge(own)

    def summed(self) -> dict[str, torch.Tensor]:
        """The weighted sum of all updates so far, float64, not to be changed."""
        return self._held[0] if self._held else {}

    def _take(self, tensors: Tensors, weight: float) -> None:
        if not self._held:
            zeros = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in tensors.items()}
            self._held.append(zeros)
        for name, tensor in tensors.items():
            self._held[0][name].add_(tensor.detach().cpu(), alpha=weight)

    def _combine(self) -> dict[str, torch.Tensor]:
        total = self.tally.total_weight
        return {name: (held / total).to(torch.float32) for name, held in self._held[0].items()}


def check_same_tensors(tensors: Tensors, expected: Tensors, whose: str) -> None:
    """Raise `ContractError` unless the tensors have the expected names and shapes."""
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
