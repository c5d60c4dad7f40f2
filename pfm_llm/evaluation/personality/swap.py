"""Swap: users are served with strangers' private parts, to test whether their own is personal."""

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.metrics import FloatArray
from pfm_llm.evaluation.personality.estimates import Bootstrap, Estimate, estimate
from pfm_llm.evaluation.personality.significance import ROUNDING


def swap_loss(quality: str, served: FloatArray, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The loss of quality with a stranger's private part.

    Definition, with q(u, v) the quality of user u served with v's private adapter and S
    strangers v drawn for u: ``mean_u [q(u, u) - mean_v q(u, v)]``. Range: that of a difference
    of the quality, [-1, 1] for NDCG and AUC. Positive: a user's own adapter serves better than
    a stranger's; the adapter is therefore personal.

    Args:
        quality: Name of the quality, such as ``log_rank``, ``auc`` or ``log_likelihood``.
        served: float64 [U, 1 + S], the quality per user (more is better, see
            `estimates.user_quality`): column 0 with the own adapter, then with the strangers'.
            A user with NaN in the row is left out.
        bootstrap: The settings of the interval.

    Returns:
        ``swap_<quality>``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: There is no stranger, or no user is left.
    """
    whole = _whole_rows(served)
    return {f"swap_{quality}": estimate(whole[:, 0] - whole[:, 1:].mean(axis=1), bootstrap)}


def identification(served: FloatArray, bootstrap: Bootstrap, by: str = "") -> dict[str, Estimate]:
    """The share of users whom their own private part serves better than any stranger's.

    Definition: the share of users u with q(u, u) > q(u, v) for all S strangers v; a tie counts as
    not identified. Range: [0, 1]. Interchangeable private parts give 1 / (1 + S), or less with
    ties. More means that a private part can be matched to its user by the user's behaviour. Use a
    quality with few ties: ``log_rank``, or the ``log_likelihood`` of likes.

    Args:
        served: float64 [U, 1 + S]; see `swap_loss`.
        bootstrap: The settings of the interval.
        by: Name of the quality; empty for the usual quality of the task.

    Returns:
        ``identification``, or ``identification_<by>``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: There is no stranger, or no user is left.
    """
    whole = _whole_rows(served)
    is_best = whole[:, 0] > whole[:, 1:].max(axis=1) + ROUNDING
    name = f"identification_{by}" if by else "identification"
    return {name: estimate(is_best.astype(np.float64), bootstrap)}


def _whole_rows(served: FloatArray) -> FloatArray:
    """The rows without NaN, float64 [users, 1 + S]."""
    served = np.asarray(served, np.float64)
    if served.ndim != 2 or served.shape[1] < 2:
        raise DataError(
            f"swap qualities of shape {served.shape}: give a row per user, with the own adapter "
            "and at least 1 stranger's"
        )
    whole: FloatArray = served[~np.isnan(served).any(axis=1)]
    if not len(whole):
        raise DataError("swap: no user has all qualities; leave this measure out, or add users")
    return whole
