"""The server's figures of a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundSummary:
    """The server's figures of a round, after its step.

    Attributes:
        round_number: The round, from 1.
        num_updates: Number of accepted updates.
        refusals: What was wrong with each refused update; the texts name clients.
        refused_by_reason: How many were refused for each `Refusal`.
        num_clipped: Number of accepted updates that were scaled down; see `NormBound`.
        num_examples: Training examples of the accepted updates.
        loss: Their weighted mean loss (nats) before local training; None without any.
        update_norm: Euclidean norm of the aggregated update; 0 without any.
        norm_quantiles: Quantiles of the norms of the updates that arrived; see `Tally`. Empty under
            privacy, which does not cover them.
        lr_factor: The factor of the learning-rate schedule in this round.
        stages: Name of each update stage to the figures of its ``summary``.
    """

    round_number: int
    num_updates: int
    refusals: tuple[str, ...]
    refused_by_reason: Mapping[str, int]
    num_clipped: int
    num_examples: int
    loss: float | None
    update_norm: float
    norm_quantiles: Mapping[str, float]
    lr_factor: float
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
