"""New items: the ranking of items without training interactions, and the private part's gain."""

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.metrics import FloatArray, IntArray, per_user
from pfm_llm.evaluation.personality.estimates import Bootstrap, Estimate, estimate, user_quality


def new_item_figures(
    own: IntArray,
    shared: IntArray,
    users: IntArray,
    num_candidates: IntArray,
    is_new: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    """Log-rank quality on new items: with the private adapter, without it, and above chance.

    Definition, over the targets N(u) of user u that occur in nobody's training history:
    ``mean_u mean_{t in N(u)} -ln(rank(t))``; a user without such a target is left out. Chance is
    a random order of the n candidates, ``-(1/n) sum_{k=1..n} ln k``. Range: that of a log-rank,
    or of a difference of two. The embeddings of these items were not trained, so only their text
    distinguishes them.

    Args:
        own: int64 [T], ranks of all targets with the private adapter, from 1.
        shared: int64 [T], the same with the shared adapter alone.
        users: int64 [T], the user of each target.
        num_candidates: int64 [T], the number of ranked items, including the target.
        is_new: bool [T], whether the target has no training interaction.
        bootstrap: The settings of the intervals.

    Returns:
        ``new_items``, the gain; ``new_items_over_chance``; ``new_items_shared`` and
        ``new_items_own``, the two qualities. Empty where no target is new.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: Lengths differ.
    """
    lengths = {len(values) for values in (own, shared, users, num_candidates, is_new)}
    if len(lengths) > 1:
        raise DataError(f"new items: arrays of lengths {sorted(lengths)}; give one entry a target")
    if not is_new.any():
        return {}
    own, shared, users = own[is_new], shared[is_new], users[is_new]
    mine = user_quality("log_rank", own, users)
    theirs = user_quality("log_rank", shared, users)
    chance, _ = per_user(_chance(num_candidates[is_new]), users)
    figures = {
        "new_items": mine - theirs,
        "new_items_over_chance": mine - chance,
        "new_items_shared": theirs,
        "new_items_own": mine,
    }
    return {name: estimate(values, bootstrap) for name, values in figures.items()}


def percentiles(ranks: IntArray, num_candidates: IntArray, users: IntArray) -> FloatArray:
    """How far up new items stand, per user, float64 [U]: 1 at the top, 0 at the bottom.

    Definition: ``mean_{t in N(u)} (n_t - rank(t)) / (n_t - 1)``. A random order has 1/2, in the
    mean.

    Args:
        ranks: int64 [T], of the new targets, from 1.
        num_candidates: int64 [T], n_t, including the target.
        users: int64 [T], the user of each target.
    """
    share = (num_candidates - ranks) / np.maximum(num_candidates - 1, 1)
    return per_user(share, users)[0]


def top_share(lists: IntArray, is_new: np.ndarray) -> FloatArray:
    """The share of new items in each list, float64 [Q].

    Args:
        lists: int64 [Q, k], items; -1 where the candidates do not fill a list.
        is_new: bool [I].
    """
    share: FloatArray = (is_new[lists] & (lists >= 0)).mean(1)
    return share


def _chance(num_candidates: IntArray) -> FloatArray:
    """Mean of -ln(rank) over all ranks, for each number of candidates."""
    sums = np.cumsum(np.log(np.arange(1, num_candidates.max() + 1)))
    means: FloatArray = -sums[num_candidates - 1] / num_candidates
    return means
