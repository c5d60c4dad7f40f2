"""The basis of all measures of personality: a quality per user, and its mean with an interval.

A *quality* is a number per user; more is better for the user. A difference of two qualities is
therefore positive if the first one serves the user better.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.evaluation.metrics import FloatArray, IntArray, bootstrap_interval, ndcg, per_user
from pfm_llm.evaluation.personality.significance import ROUNDING

_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Bootstrap:
    """The settings of intervals; see `metrics.bootstrap_interval`.

    Attributes:
        num_resamples: Resamples of the users, at least 1.
        confidence: Coverage of an interval, in (0, 1).
        seed: The experiment's seed.
    """

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over users with its percentile bootstrap interval over users.

    Attributes:
        value: The mean.
        ci_low: Lower end of the interval.
        ci_high: Upper end of this interval.
        num_users: How many users the mean is over.
    """

    value: float
    ci_low: float
    ci_high: float
    num_users: int

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is above 0, by more than `ROUNDING`."""
        return self.ci_low > ROUNDING

    @property
    def is_negative(self) -> bool:
        """Whether the whole interval is below 0, by more than `ROUNDING`."""
        return self.ci_high < -ROUNDING


def estimate(values: FloatArray, bootstrap: Bootstrap) -> Estimate:
    """The mean over users with its interval.

    Args:
        values: float64 [U], one per user; a user with NaN has no value and is left out.
        bootstrap: The settings of the interval.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: No user has a value, or one is infinite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise DataError(f"values of shape {values.shape}: give one per user")
    values = values[~np.isnan(values)]
    if not values.size:
        raise DataError("no user has a value to average; leave this measure out, or add users")
    low, high = bootstrap_interval(
        values, bootstrap.num_resamples, bootstrap.confidence, bootstrap.seed
    )
    return Estimate(float(values.mean()), low, high, int(values.size))


def paired_difference(own: FloatArray, reference: FloatArray, bootstrap: Bootstrap) -> Estimate:
    """The mean over users of ``own - reference``: positive where ``own`` serves better.

    Every claimed difference uses this function. It resamples users with both values together, so
    a user who is easy or hard for both methods adds no noise.

    Args:
        own: float64 [U], a quality; NaN for a user without one.
        reference: float64 [U], the same quality of the same users in the same order.
        bootstrap: The settings of the interval.

    Returns:
        The mean over the users that have both values, with its interval.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: Lengths differ, no user has both values, or one is infinite.
    """
    if np.shape(own) != np.shape(reference):
        raise DataError(
            f"cannot pair {np.shape(own)} with {np.shape(reference)} values: give the same users"
        )
    return estimate(np.asarray(own, np.float64) - np.asarray(reference, np.float64), bootstrap)


def _negative_log(ranks: IntArray) -> FloatArray:
    ranks = np.asarray(ranks)
    if ranks.size and ranks.min() < 1:
        raise DataError(f"rank {ranks.min()}: ranks begin at 1")
    negative: FloatArray = -np.log(ranks.astype(np.float64))
    return negative


RANK_QUALITIES: Mapping[str, Callable[[IntArray, int], FloatArray]] = {
    "log_rank": lambda ranks, _: _negative_log(ranks),
    "ndcg": ndcg,
}
"""Name of a quality to its formula for one target, ranks [T] and a cut-off to float64 [T].

``log_rank`` is -ln(rank), in [-ln(items), 0]. A step from rank 20 to 10 counts as much as one from
200 to 100, so it depends on every target and not only on the first places. ``ndcg`` is
`metrics.ndcg`, in [0, 1].
"""


def user_quality(quality: str, ranks: IntArray, users: IntArray, k: int = HEADLINE_K) -> FloatArray:
    """A quality per user: the mean over the user's targets.

    Args:
        quality: A key of `RANK_QUALITIES`.
        ranks: int64 [T], of the targets, from 1.
        users: int64 [T], the user of each target.
        k: Cut-off of ``ndcg``.

    Returns:
        float64 [U], by ascending user; more is better.

    Raises:
        ConfigError: ``quality`` is unknown.
        DataError: Lengths differ, or a rank is below 1.
    """
    if quality not in RANK_QUALITIES:
        raise ConfigError(f"unknown quality {quality!r}; valid: {', '.join(RANK_QUALITIES)}")
    return per_user(RANK_QUALITIES[quality](ranks, k), users)[0]


def align(values: FloatArray, users: IntArray, wanted: IntArray) -> FloatArray:
    """Put one value per user into another order of users.

    Args:
        values: float64 [U].
        users: int64 [U], the user of each value; distinct.
        wanted: int64 [W], the users to return.

    Returns:
        float64 [W]; NaN for a user who has no value.

    Raises:
        DataError: Lengths differ, or a user comes twice.
    """
    values, users = np.asarray(values, np.float64), np.asarray(users, np.int64)
    if values.shape != users.shape or values.ndim != 1:
        raise DataError(f"{values.shape} values for {users.shape} users: give one each")
    if len(np.unique(users)) < len(users):
        raise DataError("a user has two values: average them first, see metrics.per_user")
    value_of = dict(zip(users.tolist(), values.tolist(), strict=True))
    return np.array([value_of.get(user, np.nan) for user in np.asarray(wanted).tolist()], float)


def named_estimates(*figures: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """All figures of a run in one flat table, in the order given.

    Args:
        figures: The results of the measures.

    Raises:
        DataError: Two figures share a name, or a name is not made of ``a-z``, ``0-9``, ``_``.
    """
    merged: dict[str, Estimate] = {}
    for part in figures:
        for name, value in part.items():
            if not _NAME.fullmatch(name):
                raise DataError(f"figure {name!r}: make its name of a-z, 0-9 and _")
            if name in merged:
                raise DataError(f"two figures are called {name}; give each a name of its own")
            merged[name] = value
    return merged
