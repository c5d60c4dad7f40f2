"""The metrics of ranked lists, and the cut-off at which they are shown first."""

from collections.abc import Sequence

HEADLINE_K = 10
"""The cut-off of the figures that are shown first, where a run measures it; see `headline_k`."""

RANK_LABELS = {"ndcg": "NDCG", "hit_rate": "Hit rate", "mrr": "MRR"}
"""Metrics of ranked lists, as they are shown."""


def headline_k(ks: Sequence[int]) -> int:
    """The cut-off of a run's validations, differences and plots.

    Args:
        ks: The cut-offs that are measured, as in ``evaluation.ks``.

    Returns:
        `HEADLINE_K` where it is one of them, or where there are none; otherwise the first.
    """
    return HEADLINE_K if HEADLINE_K in ks or not ks else ks[0]
