"""Memory and cold start: the gain when the prompt, or the whole model, has a shorter history."""

from collections.abc import Mapping

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.metrics import FloatArray
from pfm_llm.evaluation.personality.estimates import (
    Bootstrap,
    Estimate,
    estimate,
    paired_difference,
)

MEMORY = "memory"
"""Curve over the items that the prompt shows (``window.items``)."""
COLD_START = "cold_start"
"""Curve over the number of interactions that prompt and private part both use."""


def curve_figures(
    name: str,
    own: Mapping[int, FloatArray],
    shared: Mapping[int, FloatArray],
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    """Quality with and without the private adapter, by number of items.

    Definition: at each number of items the means over users of the two qualities and of their
    difference. Range: those of the quality (see `estimates.RANK_QUALITIES`). A positive gain means
    that the private part remembers items that the prompt does not show.

    Args:
        name: `MEMORY` or `COLD_START`, followed by a quality if there are several.
        own: Number of items to float64 [U], the quality per user with the private adapter (more
            is better); NaN for a user without one.
        shared: The same with the shared adapter alone, users in the same order.
        bootstrap: The settings of the intervals.

    Returns:
        By ascending number of items ``<name>_<items>``, the gain (positive is better), and
        ``<name>_<items>_shared`` and ``<name>_<items>_own``, the two qualities. Each is a mean over
        the users that have both values at this point. To compare points over equal users, give NaN
        at every point for users who lack a value at one.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: The numbers of items or the lengths differ, or a point has no users.
    """
    if own.keys() != shared.keys():
        raise DataError(
            f"a curve with the private adapter at {sorted(own)} items and without it at "
            f"{sorted(shared)}; measure both at the same numbers of items"
        )
    figures = {}
    for items in sorted(own):
        mine, theirs = (np.asarray(values[items], np.float64) for values in (own, shared))
        figures[f"{name}_{items}"] = paired_difference(mine, theirs, bootstrap)
        has_both = ~(np.isnan(mine) | np.isnan(theirs))
        figures[f"{name}_{items}_shared"] = estimate(theirs[has_both], bootstrap)
        figures[f"{name}_{items}_own"] = estimate(mine[has_both], bootstrap)
    return figures


def over_longer(
    own: Mapping[int, FloatArray], shared: Mapping[int, FloatArray], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Few items in the prompt with the private part, beside more of them without it.

    Definition: the mean over users of the quality with the fewest items and the private part, less
    that with more items and the shared part alone. Above 0, the private part is worth more than
    the items that the prompt does not show.

    Args:
        own: As in `curve_figures`.
        shared: Likewise.
        bootstrap: The settings of the intervals.

    Returns:
        By ascending number ``memory_<fewest>_over_<number>``.
    """
    fewest, *longer = sorted(own)
    return {
        f"{MEMORY}_{fewest}_over_{items}": paired_difference(own[fewest], shared[items], bootstrap)
        for items in longer
    }


def over_none(
    own: Mapping[int, FloatArray], shared: Mapping[int, FloatArray], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """What each number of known interactions is worth beside none, paired over users.

    Definition: the mean over users of the quality with so many interactions less that without any.
    Above 0, a user is served better for being known.

    Args:
        own: As in `curve_figures`; number 0 is there.
        shared: Likewise.
        bootstrap: The settings of the intervals.

    Returns:
        By ascending number ``cold_start_<number>_over_none``, and the same with ``_shared``.
    """
    return {
        f"{COLD_START}_{items}_over_none{kind}": paired_difference(
            quality[items], quality[0], bootstrap
        )
        for items in sorted(own)
        if items
        for kind, quality in (("", own), ("_shared", shared))
    }
