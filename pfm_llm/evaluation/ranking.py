"""From scores to ranks of held-out items, and from ranks to rows of results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.config.cut_offs import HEADLINE_K, RANK_LABELS
from pfm_llm.config.running import EvaluationConfig
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import metrics, scoring
from pfm_llm.evaluation.baselines.selection import FittedBaseline
from pfm_llm.evaluation.results import AUC, FULL, SAMPLED, ResultRow

QUERIES_AT_ONCE = 1024
_ONE_CLASS = (
    "no user has both a liked and a disliked held-out item: there is no AUC; raise data.held_out, "
    "or set data.like_threshold to a rating that divides them"
)


@dataclass(frozen=True)
class Ranks:
    """Ranks of all targets of some queries, from 1.

    Attributes:
        users: int64 [T], the user of each target.
        full: int64 [T], rank among the full catalogue without seen items.
        sampled: int64 [T], rank among the target and its sampled negatives.
        lists: int32 [T, depth], the first items of each target's list, see `scoring.lists_around`;
            None where nobody asked for them.
    """

    users: np.ndarray
    full: np.ndarray
    sampled: np.ndarray
    lists: np.ndarray | None = None


def rank_scores(
    scores: np.ndarray,
    held_out: HeldOut,
    queries: Sequence[int],
    negatives: np.ndarray,
    depth: int = 0,
) -> Ranks:
    """Rank the targets of some queries.

    Args:
        scores: float [Q, I], a row per query.
        held_out: Where the queries are from.
        queries: int [Q], their indices in it.
        negatives: int [all targets of ``held_out``, num_negatives].
        depth: Length of the lists to keep; 0: none.
    """
    asked = held_out.take(queries)
    histories, targets = asked.histories, asked.targets
    full = scoring.full_ranks(scores, histories, targets)
    return Ranks(
        users=np.repeat(asked.users, [len(own) for own in targets]),
        full=full,
        sampled=scoring.sampled_ranks(scores, targets, negatives[held_out.target_rows(queries)]),
        lists=scoring.lists_around(scores, histories, targets, full, depth) if depth else None,
    )


def rank_baseline(
    baseline: FittedBaseline, held_out: HeldOut, negatives: np.ndarray, depth: int = 0
) -> Ranks:
    """Rank all targets of a split with a baseline; see `rank_all`."""

    def score(queries: Sequence[int]) -> np.ndarray:
        return baseline.score([held_out.histories[q] for q in queries])

    batch = scoring.queries_at_once(baseline.num_items, QUERIES_AT_ONCE)
    return rank_all(score, held_out, negatives, batch, depth)


def rank_all(
    score: Callable[[Sequence[int]], np.ndarray],
    held_out: HeldOut,
    negatives: np.ndarray,
    batch: int = QUERIES_AT_ONCE,
    depth: int = 0,
) -> Ranks:
    """Rank all targets of a split.

    Args:
        score: Indices of queries to their scores, float [queries, I].
        held_out: The queries.
        negatives: See `rank_scores`.
        batch: How many queries are scored at once.
        depth: See `rank_scores`.
    """
    parts = []
    for start in range(0, len(held_out.users), batch):
        queries = range(start, min(start + batch, len(held_out.users)))
        parts.append(rank_scores(score(queries), held_out, queries, negatives, depth))
    return concatenate(parts)


def headline(ranks: Ranks, k: int = HEADLINE_K) -> dict[str, float]:
    """NDCG and hit rate at ``k`` over the full catalogue, for the log of a run."""
    figures: dict[str, float] = {}
    for name in ("ndcg", "hit_rate"):
        metric = metrics.RankMetric(name, k)
        figures |= metric.compute(ranks=ranks.full, groups=ranks.users) or {}
    return figures


def result_rows(
    ranks: Ranks, describe: Callable[..., ResultRow], config: EvaluationConfig, seed: int
) -> list[ResultRow]:
    """Rows for ``results.json``: every metric, k and set of candidates, with intervals.

    Args:
        ranks: The ranks of the targets.
        describe: Makes a row from ``candidates, metric, k, value, ci_low, ci_high, num_users``.
        config: Cut-offs and bootstrap.
        seed: The experiment's seed.
    """
    rows = []
    for candidates, values in (
        (FULL, ranks.full),
        (f"{SAMPLED}{config.num_negatives}", ranks.sampled),
    ):
        for name in RANK_LABELS:
            for k in dict.fromkeys(config.ks):
                own, _ = metrics.per_user(metrics.RANK_METRICS[name](values, k), ranks.users)
                figure = _figure(own, config, seed)
                rows.append(describe(candidates=candidates, metric=name, k=k, **figure))
    return rows


def check_classes(liked: Iterable[np.ndarray]) -> None:
    """Check that some user has both classes of the task ``like``, so that there is an AUC.

    Args:
        liked: Per user bool [targets].

    Raises:
        DataError: No user has both classes.
    """
    if not any(own.any() and not own.all() for own in liked):
        raise DataError(_ONE_CLASS)


def auc_row(
    aucs: np.ndarray, describe: Callable[..., ResultRow], config: EvaluationConfig, seed: int
) -> ResultRow:
    """The row of the task ``like``: the mean AUC over the users that have both classes.

    Args:
        aucs: float64 [users], NaN without both classes.
        describe: See `result_rows`.
        config: See `result_rows`.
        seed: See `result_rows`.

    Raises:
        DataError: No user has both classes.
    """
    own = aucs[~np.isnan(aucs)]
    if not len(own):
        raise DataError(_ONE_CLASS)
    return describe(candidates=FULL, metric=AUC, k=0, **_figure(own, config, seed))


def _figure(own: np.ndarray, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    """The numbers of a row: the mean of a value per user, with its interval."""
    low, high = metrics.bootstrap_interval(own, config.bootstrap, config.confidence, seed)
    return {
        "value": float(own.mean()), "ci_low": low, "ci_high": high, "num_users": len(own),
    }  # fmt: skip


def concatenate(parts: Sequence[Ranks]) -> Ranks:
    """Ranks of several groups of users, ordered by user."""
    users = np.concatenate([part.users for part in parts])
    # Sorted by user, so that the result does not depend on the division of the work.
    order = np.argsort(users, kind="stable")
    full, sampled = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("full", "sampled")
    )
    lists = [part.lists for part in parts if part.lists is not None]
    return Ranks(users[order], full, sampled, np.concatenate(lists)[order] if lists else None)
