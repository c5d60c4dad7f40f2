"""Memory and cold start: the gain as a model is shown or given less of a user's history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
"""Curve over the interactions that a user has given, to prompt and private adapter alike."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve.

    Attributes:
        items: Items in the prompt's window, or interactions given.
        shared: Quality of the shared adapter alone.
        own: Quality with the private adapter.
        gain: ``own - shared``, paired over users.
    """

    items: int
    shared: Estimate
    own: Estimate
    gain: Estimate


def curve(
    own: Mapping[int, FloatArray], shared: Mapping[int, FloatArray], bootstrap: Bootstrap
) -> list[CurvePoint]:
    """Quality with and without the private adapter, by number of items.

    Definition: at each number of items the means over users of the two qualities and of their
    difference. Range: those of the quality (see `estimates.RANK_QUALITIES`). Positive gain: the
    private adapter remembers what the prompt does not show.

    Args:
        own: Number of items to float64 [U], the quality per user with the private adapter (more
            is better); NaN for a user without one.
        shared: The same with the shared adapter alone, users in the same order.
        bootstrap: How to make the intervals.

    Returns:
        By ascending number of items; each point over the users that have both values there. Give
        NaN everywhere for users who lack a value somewhere, to compare points over equal users.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: The numbers of items or the lengths differ, or a point has no users.
    """
    if own.keys() != shared.keys():
        raise DataError(
            f"a curve with the private adapter at {sorted(own)} items and without it at "
            f"{sorted(shared)}: measure both at the same"
        )
    return [_point(items, own[items], shared[items], bootstrap) for items in sorted(own)]


def curve_figures(name: str, points: Sequence[CurvePoint]) -> dict[str, Estimate]:
    """The points of a curve as named figures.

    Args:
        name: `MEMORY` or `COLD_START`, with a quality behind it where there are several.
        points: From `curve`.

    Returns:
        Per point ``<name>_<items>``, its gain (positive is better), and ``<name>_<items>_shared``
        and ``<name>_<items>_own``, the two qualities.
    """
    figures = {}
    for point in points:
        figures[f"{name}_{point.items}"] = point.gain
        figures[f"{name}_{point.items}_shared"] = point.shared
        figures[f"{name}_{point.items}_own"] = point.own
    return figures


def _point(items: int, own: FloatArray, shared: FloatArray, bootstrap: Bootstrap) -> CurvePoint:
    gain = paired_difference(own, shared, bootstrap)
    own, shared = np.asarray(own, np.float64), np.asarray(shared, np.float64)
    has_both = ~(np.isnan(own) | np.isnan(shared))
    return CurvePoint(
        items=items,
        shared=estimate(shared[has_both], bootstrap),
        own=estimate(own[has_both], bootstrap),
        gain=gain,
    )
