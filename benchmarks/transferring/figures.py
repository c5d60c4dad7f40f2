"""From ranks to rows: means over users, and paired differences of the same users."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.evaluation.personality.estimates import (
    Bootstrap,
    Estimate,
    estimate,
    paired_difference,
    user_quality,
)
from pfm_llm.evaluation.personality.new_items import percentiles

QUALITIES = ("ndcg", "log_rank", "percentile")
RANDOM = "random"

Qualities = Mapping[str, np.ndarray]
"""Per quality a number for each user, float64 [U]; more is better."""


@dataclass(frozen=True)
class Asked:
    """The users of one seed, and how many items their targets are ranked among.

    Attributes:
        users: External ids, in the order of the queries.
        candidates: int64 [U].
    """

    users: tuple[str, ...]
    candidates: np.ndarray


def qualities(ranks: Sequence[int], asked: Asked) -> Qualities:
    """The qualities of ranks, one target a user.

    NDCG is cut off at `HEADLINE_K`, log-rank is -ln(rank), and the percentile is 1 at the top of
    the list and 0 at its end.
    """
    found, users = np.asarray(ranks), np.arange(len(asked.users))
    values = {name: user_quality(name, found, users) for name in ("ndcg", "log_rank")}
    return {**values, "percentile": percentiles(found, asked.candidates, users)}


def by_chance(asked: Asked) -> Qualities:
    """What a random order of the candidates has in the mean, of each user."""
    all_ranks = [np.arange(1, count + 1) for count in asked.candidates.tolist()]
    means = {
        name: np.array([user_quality(name, ranks, np.zeros_like(ranks))[0] for ranks in all_ranks])
        for name in ("ndcg", "log_rank")
    }
    return {**means, "percentile": np.full(len(all_ranks), 0.5)}


def pooled(asked: Sequence[Asked], values: Sequence[Qualities]) -> Qualities:
    """The qualities of several seeds: a user of several seeds counts once, with the mean.

    Returns:
        Per quality float64 [U], in the order of the users' ids.
    """
    ids, rows = np.unique(np.concatenate([one.users for one in asked]), return_inverse=True)
    counts = np.bincount(rows, minlength=len(ids))
    return {
        name: np.bincount(rows, np.concatenate([one[name] for one in values])) / counts
        for name in QUALITIES
    }


def rows(found: Mapping[str, Qualities], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each quality of each method, and for each difference of two methods.

    Args:
        found: Name to qualities, all of the same users in the same order.
        pairs: The names of what is compared; a difference is positive where the first is better.
    """
    bootstrap = Bootstrap()
    result = [
        _row(f"{name}_{quality}", quality, estimate(values[quality], bootstrap))
        for name, values in found.items()
        for quality in QUALITIES
    ]
    for one, other in pairs:
        for quality in QUALITIES:
            gain = paired_difference(found[one][quality], found[other][quality], bootstrap)
            result.append(_row(f"{one}_over_{other}_{quality}", quality, gain))
    return result


def _row(metric: str, quality: str, value: Estimate) -> dict[str, Any]:
    k = HEADLINE_K if quality == "ndcg" else 0
    return {"metric": metric, "k": k, "split": "test", "candidates": "full", **asdict(value)}
