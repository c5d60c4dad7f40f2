"""Ranking metrics: formulas, an `evaluate.Metric` of them, and bootstrap intervals over users.

Hit rate, NDCG and MRR are functions of a target's rank (1 is best, see `scoring`), with one
relevant item per rank. A user with several targets counts once, by the mean over the targets.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.base.seeding import numpy_generator

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]

_DRAWS_AT_ONCE = 1 << 20


def hit_rate(ranks: IntArray, k: int) -> FloatArray:
    """1 where the rank is at most ``k``, else 0.

    Args:
        ranks: [targets], integers from 1.
        k: Length of the list, at least 1.

    Returns:
        float64 [targets].

    Raises:
        ConfigError: ``k`` is below 1.
        DataError: A rank is below 1.
    """
    return _in_list(ranks, k).astype(np.float64)


def ndcg(ranks: IntArray, k: int) -> FloatArray:
    """1 / log2(1 + rank) where the rank is at most ``k``, else 0; see `hit_rate`.

    With one relevant item the ideal gain is 1, so this is already normalised.
    """
    return np.where(_in_list(ranks, k), 1.0 / np.log2(1.0 + ranks), 0.0)


def mrr(ranks: IntArray, k: int) -> FloatArray:
    """1 / rank where the rank is at most ``k``, else 0; see `hit_rate`."""
    return np.where(_in_list(ranks, k), 1.0 / ranks, 0.0)


RANK_METRICS: Mapping[str, Callable[[IntArray, int], FloatArray]] = {
    "ndcg": ndcg,
    "hit_rate": hit_rate,
    "mrr": mrr,
}
"""Name in ``results.json`` to formula."""


def auc(scores: npt.NDArray[np.floating], labels: npt.NDArray[Any]) -> float:
    """The probability that a liked item scores above one that is not.

    The area under the ROC curve by the definition of Mann and Whitney (1947): the share of pairs
    (liked, not liked) that are in order. A tie counts one half, so a constant scorer gets 0.5. A
    pair with a NaN counts as not in order. The pairs are counted from sorted scores, in
    O(n log n) for n examples.

    Args:
        scores: [examples].
        labels: [examples], true or 1 where liked.

    Returns:
        In [0, 1]; NaN when all labels are equal, where it is not defined.

    Raises:
        DataError: Lengths differ.
    """
    scores, liked = np.asarray(scores), np.asarray(labels).astype(np.bool_)
    if scores.shape != liked.shape or scores.ndim != 1:
        raise DataError(f"{scores.shape} scores for {liked.shape} labels: give one each")
    positives, negatives = scores[liked], scores[~liked]
    if not positives.size or not negatives.size:
        return float("nan")
    valid, ordered = positives[~np.isnan(positives)], np.sort(negatives[~np.isnan(negatives)])
    below = np.searchsorted(ordered, valid, side="left").sum()
    not_above = np.searchsorted(ordered, valid, side="right").sum()
    # A tied negative is in the second sum alone, so it counts one half.
    return float((below + not_above) / 2 / (positives.size * negatives.size))


def per_user_auc(
    scores: Sequence[npt.NDArray[np.floating]], liked: Sequence[npt.NDArray[np.bool_]]
) -> FloatArray:
    """`auc` of each user's held-out items.

    Args:
        scores: Per user [items].
        liked: Per user [items], beside ``scores``.

    Returns:
        float64 [users]; NaN for users without both classes. They have no AUC, and a mean must leave
        them out.

    Raises:
        DataError: Lengths differ.
    """
    if len(scores) != len(liked):
        raise DataError(f"scores of {len(scores)} users, likes of {len(liked)}: give both of each")
    return np.array([auc(*pair) for pair in zip(scores, liked, strict=True)], np.float64)


def per_user_log_likelihood(
    logits: Sequence[npt.NDArray[np.floating]], liked: Sequence[npt.NDArray[np.bool_]]
) -> FloatArray:
    """The mean log-likelihood of each user's labels, in nats.

    Args:
        logits: Per user [items], log-odds that each is liked.
        liked: Per user [items], beside ``logits``.

    Returns:
        float64 [users], at most 0, more is better; -ln 2 for a random guess.

    Raises:
        DataError: Lengths differ.
    """
    if len(logits) != len(liked):
        raise DataError(f"logits of {len(logits)} users, likes of {len(liked)}: give both of each")
    signed = (
        np.where(own, odds, -odds).astype(np.float64)
        for odds, own in zip(logits, liked, strict=True)
    )
    return np.array([-np.logaddexp(0.0, -values).mean() for values in signed], np.float64)


def per_user_choice_log_likelihood(
    scores: npt.NDArray[np.floating], histories: Sequence[IntArray], targets: Sequence[IntArray]
) -> FloatArray:
    """The mean log-likelihood, in nats, of each user's targets among all candidates.

    Args:
        scores: [users, items], logits of a softmax over the catalogue.
        histories: Per user the history, whose items are no candidates.
        targets: Per user the target items, none of them in the history.

    Returns:
        float64 [users], at most 0, more is better; -ln(candidates) for a guess. NaN without
        targets.

    Raises:
        DataError: Lengths differ.
    """
    if not len(scores) == len(histories) == len(targets):
        raise DataError(
            f"scores of {len(scores)} users, {len(histories)} histories, {len(targets)} users' "
            "targets: give all of each"
        )
    found = np.full(len(scores), np.nan)
    for user, (row, seen, chosen) in enumerate(zip(scores, histories, targets, strict=True)):
        if len(chosen):
            logits = row.astype(np.float64)
            found[user] = logits[chosen].mean() - np.logaddexp.reduce(np.delete(logits, seen))
    return found


def per_user(values: FloatArray, groups: IntArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Average within each user.

    Args:
        values: [targets].
        groups: [targets], the user of each.

    Returns:
        The means (float64 [users]) and their users (int64 [users], ascending).

    Raises:
        DataError: Lengths differ.
    """
    values, groups = np.asarray(values, np.float64), np.asarray(groups, np.int64)
    if values.shape != groups.shape or values.ndim != 1:
        raise DataError(f"{values.shape} values for {groups.shape} users: give one each")
    users, index = np.unique(groups, return_inverse=True)
    means = np.bincount(index, values, len(users)) / np.bincount(index, None, len(users))
    return means, users.astype(np.int64)


def bootstrap_interval(
    per_user_values: FloatArray, num_resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling users.

    Args:
        per_user_values: [users], one value each (see `per_user`).
        num_resamples: At least 1.
        confidence: Coverage, in (0, 1).
        seed: The experiment's seed. Equal seeds resample the same users for all values.

    Returns:
        The lower and the upper end.

    Raises:
        ConfigError: ``num_resamples`` or ``confidence`` is out of range.
        DataError: There are no values, or one is not finite.
    """
    values = np.asarray(per_user_values, np.float64)
    if num_resamples < 1:
        raise ConfigError(f"evaluation.bootstrap is {num_resamples}; set it to at least 1 resample")
    if not 0 < confidence < 1:
        raise ConfigError(f"evaluation.confidence is {confidence}; set it between 0 and 1, as 0.95")
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise DataError("a bootstrap needs one finite value per user, and at least one user")
    means = resampled_means(values, num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_means(values: FloatArray, num_resamples: int, seed: int) -> FloatArray:
    """The means of the resamples of users in `bootstrap_interval`.

    Args:
        values: float64 [users], at least one.
        num_resamples: Number of resamples.
        seed: See `bootstrap_interval`.

    Returns:
        float64 [num_resamples].
    """
    random = numpy_generator(seed, "bootstrap")
    at_once = max(1, _DRAWS_AT_ONCE // values.size)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, at_once):
        stop = min(start + at_once, num_resamples)
        drawn = random.integers(values.size, size=(stop - start, values.size))
        means[start:stop] = values[drawn].mean(axis=1)
    return means


def mean_over_users(values: FloatArray, groups: IntArray) -> float:
    """Mean over users of each user's mean; see `per_user`.

    Raises:
        DataError: Lengths differ, or there is nothing to average.
    """
    means, users = per_user(values, groups)
    if not users.size:
        raise DataError("nothing to average: there are no held-out targets; check data.split")
    return float(means.mean())


class RankMetric(evaluate.Metric):
    """A metric of ranks for `evaluate`: ``compute(ranks=..., groups=...)``, groups being the users.

    The result's key is ``<name>@<k>``. It is made directly, offline, with nothing kept on disk.

    Args:
        name: One of `RANK_METRICS`.
        k: Length of the list, at least 1.

    Raises:
        ConfigError: ``k`` is below 1.
    """

    def __init__(self, name: str, k: int) -> None:
        check_k(k)
        self.metric, self.k = name, k
        # A given seed keeps evaluate from reading numpy's global random state.
        super().__init__(keep_in_memory=True, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("int64") for name in ("ranks", "groups")}
        return evaluate.MetricInfo(
            description=f"{self.metric}@{self.k}, averaged within each user and then over users.",
            citation="",
            inputs_description=f"One value per example: {', '.join(features)}",
            features=datasets.Features(features),
        )

    def _compute(self, ranks: list[int], groups: list[int]) -> dict[str, float]:
        values = RANK_METRICS[self.metric](np.asarray(ranks, np.int64), self.k)
        return {f"{self.metric}@{self.k}": mean_over_users(values, np.asarray(groups, np.int64))}


def _in_list(ranks: IntArray, k: int) -> npt.NDArray[np.bool_]:
    check_k(k)
    ranks = np.asarray(ranks)
    if ranks.size and ranks.min() < 1:
        raise DataError(f"rank {ranks.min()}: ranks begin at 1")
    return ranks <= k


def check_k(k: int) -> None:
    """Check the length of a list.

    Raises:
        ConfigError: It is below 1.
    """
    if k < 1:
        raise ConfigError(f"evaluation.ks holds {k}; set every list length to at least 1")
