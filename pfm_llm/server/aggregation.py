"""Aggregation of the updates of a round into one update.

This module handles no data of clients and no private states.
"""

import abc
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from pfm_llm.base.errors import ContractError, TrainingError
from pfm_llm.config.choices import Aggregation, Weighting
from pfm_llm.protocol.types import ClientUpdate, Refusal, Tensors


@dataclass
class Tally:
    """The clients of the updates in an aggregator, and sums over them.

    Attributes:
        client_ids: The clients whose updates were added, in order.
        refusals: What was wrong with each refused update; the texts name clients.
        reasons: How many were refused for each `Refusal`.
        total_weight: The sum of the weights of the added updates.
        weighted_loss: The sum of their losses (nats), each times its weight.
        num_examples: The sum of their examples.
        noted: Name of a stage to the number that it noted for each update, in order.
        sizes: The sizes of each added update; see `NormBound`.
        clipped: How many of the added updates `NormBound` scaled down.
    """

    client_ids: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    total_weight: float = 0.0
    weighted_loss: float = 0.0
    num_examples: int = 0
    noted: dict[str, list[float]] = field(default_factory=dict)
    sizes: list[torch.Tensor] = field(default_factory=list)
    clipped: int = 0

    @property
    def num_updates(self) -> int:
        """How many updates were added."""
        return len(self.client_ids)

    @property
    def loss(self) -> float | None:
        """Their weighted mean loss (nats); None when nothing was added."""
        return self.weighted_loss / self.total_weight if self.client_ids else None

    def note(self, noted: Mapping[str, float]) -> None:
        """Keep the numbers that the stages noted for one update."""
        for name, figure in noted.items():
            self.noted.setdefault(name, []).append(figure)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.client_ids += other.client_ids
        self.refusals += other.refusals
        self.reasons += other.reasons
        self.total_weight += other.total_weight
        self.weighted_loss += other.weighted_loss
        self.num_examples += other.num_examples
        for name, figures in other.noted.items():
            self.noted.setdefault(name, []).extend(figures)
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
        if not self.tally.client_ids:
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

    @classmethod
    def of_sum(cls, sums: Tensors, tally: Tally) -> Self:
        """A mean of updates of which only the sum is known.

        Args:
            sums: The sum of weight times update, float64.
            tally: Who is in it, and what their weights, losses and examples add up to.
        """
        mean = cls()
        mean._held.append(dict(sums))
        mean.tally = tally
        return mean

    def _take(self, tensors: Tensors, weight: float) -> None:
        if not self._held:
            zeros = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in tensors.items()}
            self._held.append(zeros)
        for name, tensor in tensors.items():
            self._held[0][name].add_(tensor.detach().cpu(), alpha=weight)

    def _combine(self) -> dict[str, torch.Tensor]:
        total = self.tally.total_weight
        return {name: (held / total).to(torch.float32) for name, held in self._held[0].items()}


class CoordinateMedian(Aggregator):
    """The median over clients, of each number on its own.

        Δ̃[j] = median { Δ_u[j] : u in the cohort }   (Yin et al. 2018, arXiv 1803.01498, option I)

    For an even number of clients it is the mean of the two middle values, computed in float64. As
    long as fewer than half of the clients are hostile, each number stays within the range of the
    honest values.

    The median is unweighted. A weight is the client's own claim (its number of examples), so a
    client with a large claim would form a majority. Config validation requires
    ``weighting: uniform``.

    The median keeps all updates of a round, 4 bytes per number and client; the mean keeps 8 bytes
    per number. If most clients do not change a number, its median change is 0. A table with a row
    per item therefore learns less about rare items than with the mean.
    """

    def _take(self, tensors: Tensors, weight: float) -> None:
        self._held.append({n: t.detach().to("cpu", copy=True) for n, t in tensors.items()})

    def _combine(self) -> dict[str, torch.Tensor]:
        return {name: self._median(name) for name in self._held[0]}

    def _median(self, name: str) -> torch.Tensor:
        ordered = torch.stack([held[name] for held in self._held]).sort(dim=0).values
        count = len(ordered)
        low, high = ordered[(count - 1) // 2], ordered[count // 2]
        return ((low.double() + high.double()) / 2).to(torch.float32)


AGGREGATORS: Mapping[Aggregation, Callable[[], Aggregator]] = {
    Aggregation.MEAN: WeightedMean,
    Aggregation.MEDIAN: CoordinateMedian,
}
"""The choices of ``federation.server.aggregator``."""


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
