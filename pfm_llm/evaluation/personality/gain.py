"""Gain: the difference that the private part makes, for the same users and targets."""

from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.evaluation.metrics import FloatArray, IntArray
from pfm_llm.evaluation.personality.estimates import (
    RANK_QUALITIES,
    Bootstrap,
    Estimate,
    paired_difference,
    user_quality,
)


def rank_gain(
    own: IntArray,
    reference: IntArray,
    users: IntArray,
    bootstrap: Bootstrap,
    over: str = "",
    k: int = HEADLINE_K,
) -> dict[str, Estimate]:
    """Gain in ranks over a reference.

    Definition, with R(u) the targets of user u and means over users::

        gain_log_rank = mean_u mean_{t in R(u)} [ln rank_reference(t) - ln rank_own(t)]
        gain_ndcg     = mean_u mean_{t in R(u)} [NDCG@k_own(t) - NDCG@k_reference(t)]

    Range: [-ln I, ln I] with I items, and [-1, 1]. A log-rank gain of 0.1 means that the target
    stands at 1 / exp(0.1) = 90 % of its former rank. Positive: the private adapter helps.

    Args:
        own: int64 [T], ranks with the private adapter, from 1.
        reference: int64 [T], ranks of the same targets in the same order without it.
        users: int64 [T], the user of each target.
        bootstrap: The settings of the intervals.
        over: The reference, such as ``"private"``: the names then end in ``_over_private``. Empty
            for the shared part alone.
        k: Cut-off of the NDCG.

    Returns:
        ``gain_log_rank`` and ``gain_ndcg``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: Lengths differ, there are no targets, or a rank is below 1.
    """
    return {
        _name(quality, over): paired_difference(
            user_quality(quality, own, users, k),
            user_quality(quality, reference, users, k),
            bootstrap,
        )
        for quality in RANK_QUALITIES
    }


def auc_gain(
    own: FloatArray, reference: FloatArray, bootstrap: Bootstrap, over: str = ""
) -> dict[str, Estimate]:
    """Gain in AUC over a reference.

    Definition: ``gain_auc = mean_u [AUC_own(u) - AUC_reference(u)]``. Range: [-1, 1]. Positive:
    the private adapter helps.

    Args:
        own: float64 [U], AUC per user with the private part (`metrics.auc`). It is NaN for a user
            whose labels are all equal; this user is left out.
        reference: float64 [U], AUC of the same users in the same order without it.
        bootstrap: The settings of the interval.
        over: See `rank_gain`.

    Returns:
        ``gain_auc``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: Lengths differ, or no user has both values.
    """
    return {_name("auc", over): paired_difference(own, reference, bootstrap)}


def _name(quality: str, over: str) -> str:
    return f"gain_{quality}_over_{over}" if over else f"gain_{quality}"
