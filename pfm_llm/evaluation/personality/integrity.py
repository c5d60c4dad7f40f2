"""Integrity: how similar a user's list remains when a new shared adapter arrives.

Webber, Moffat and Zobel, "A similarity measure for indefinite rankings", ACM Transactions on
Information Systems 28(4), 2010.
"""

import numpy as np

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.metrics import FloatArray, IntArray
from pfm_llm.evaluation.personality.estimates import Bootstrap, Estimate, estimate

PERSISTENCE = 0.9
"""The first 10 places then hold 86 % of the weight (Webber et al. 2010)."""


def rank_biased_overlap(
    before: IntArray, after: IntArray, persistence: float = PERSISTENCE
) -> FloatArray:
    """Extrapolated rank-biased overlap of two ranked lists per user.

    Webber et al. 2010, RBO_ext, equation 32, for lists of equal length k without ties, with X_d
    the number of items that the first d places of both lists have in common::

        RBO_ext = X_k / k p^k + (1 - p) / p sum_{d=1..k} X_d / d p^d

    Range: [0, 1]: 0 for lists without a common item, 1 for equal lists.

    Args:
        before: int [U, k], each user's items, best first.
        after: int [U, k], the same users in the same order.
        persistence: p in (0, 1). With a larger p, lower places count more.

    Returns:
        float64 [U].

    Raises:
        ConfigError: ``persistence`` is out of range.
        DataError: Shapes differ, lists are empty, or an item comes twice in a list.
    """
    before, after = np.asarray(before), np.asarray(after)
    if not 0 < persistence < 1:
        raise ConfigError(
            f"rank-biased overlap: persistence is {persistence}; set it between 0 and 1"
        )
    if before.shape != after.shape or before.ndim != 2 or not before.shape[1]:
        raise DataError(
            f"rank-biased overlap of {before.shape} and {after.shape}: give two lists of equal "
            "length, at least 1, per user"
        )
    common = np.zeros(before.shape)
    for user, (old, new) in enumerate(zip(before, after, strict=True)):
        for ranking in (old, new):
            if len(np.unique(ranking)) < len(ranking):
                raise DataError(f"rank-biased overlap, row {user}: an item comes twice in a list")
        _, place_old, place_new = np.intersect1d(old, new, assume_unique=True, return_indices=True)
        # A common item counts from the depth at which both lists have it.
        np.add.at(common[user], np.maximum(place_old, place_new), 1.0)
    depths = np.arange(1, before.shape[1] + 1)
    agreement = np.cumsum(common, axis=1) / depths
    weights = persistence**depths
    infinite: FloatArray = (1 - persistence) / persistence * (agreement @ weights)
    return infinite + agreement[:, -1] * weights[-1]


def integrity(
    before: IntArray, after: IntArray, bootstrap: Bootstrap, retuned: bool = False
) -> dict[str, Estimate]:
    """The similarity of the users' lists before and after a new shared adapter.

    Definition: the mean over users of `rank_biased_overlap` (p = 0.9) of the top k before and
    after. Range: [0, 1]. More means that a user's list changes less.

    Args:
        before: int [U, k], each user's items with the former shared adapter, best first.
        after: int [U, k], the same with the new one.
        bootstrap: The settings of the interval.
        retuned: Whether the private part was fitted again before ``after``.

    Returns:
        ``integrity_rbo``, or ``integrity_rbo_retuned``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: See `rank_biased_overlap`, or there are no users.
    """
    name = "integrity_rbo_retuned" if retuned else "integrity_rbo"
    return {name: estimate(rank_biased_overlap(before, after), bootstrap)}
