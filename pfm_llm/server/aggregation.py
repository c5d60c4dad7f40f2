"""Streamed aggregation of updates: updates come in, a mean goes out.

Nothing here knows of clients' data or private states.
"""

import math
from typing import Self, TypedDict

import torch

from pfm_llm.base.errors import ContractError, TrainingError
from pfm_llm.config.choices import Weighting
from pfm_llm.protocol.types import ClientUpdate, Tensors


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
            check_same_tensors(tensors, self._tensors, client_ids[0])

    def _accumulate(self, tensors: Tensors, weight: float) -> None:
        if not self._tensors:
            self._tensors = {
                name: torch.zeros(tensor.shape, dtype=torch.float64)
                for name, tensor in tensors.items()
            }
        for name, tensor in tensors.items():
            self._tensors[name].add_(tensor.detach().cpu(), alpha=weight)


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
