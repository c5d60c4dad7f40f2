"""Harm: whether a private adapter that helps on average leaves some users worse off."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.metrics import FloatArray, resampled_means
from pfm_llm.evaluation.personality.estimates import Bootstrap, Estimate, estimate
from pfm_llm.evaluation.personality.groups import members, slug
from pfm_llm.evaluation.personality.significance import ROUNDING, holm

MIN_USERS = 10
"""Groups with fewer users are merged."""

_RESAMPLES_PER_TEST = 4  # at 1, a single resample could decide


@dataclass(frozen=True)
class GroupHarm:
    """The effect of the private part on a group of users.

    Attributes:
        gain: Mean gain of the group; positive is better.
        p_value: One-sided, of the hypothesis that the group is not harmed; in (0, 1].
        adjusted_p_value: The same after Holm's correction over all groups; in (0, 1].
        is_harmed: The whole interval is below 0.
        is_harmed_adjusted: ``adjusted_p_value`` is below (1 - confidence) / 2, the chance that
            an interval is wrong on that side; it implies ``is_harmed``.
    """

    gain: Estimate
    p_value: float
    adjusted_p_value: float
    is_harmed: bool
    is_harmed_adjusted: bool


def not_harmed(gain: FloatArray, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The share of users who are not worse off.

    Definition: the share of users whose gain is at least 0. Range: [0, 1]. More is better. With few
    targets per user, noise in the ranks makes many users a little worse off by chance. This share
    alone is therefore no proof of harm; see `group_harm`.

    Args:
        gain: float64 [U], own minus reference; a user with NaN is left out.
        bootstrap: The settings of the interval.

    Returns:
        ``not_harmed``.

    Raises:
        ConfigError: ``bootstrap`` is out of range.
        DataError: No user has a gain.
    """
    gain = np.asarray(gain, np.float64)
    is_spared = (gain >= -ROUNDING).astype(np.float64)
    return {"not_harmed": estimate(np.where(np.isnan(gain), np.nan, is_spared), bootstrap)}


def group_harm(
    gain: FloatArray,
    groupings: Mapping[str, Sequence[str]],
    bootstrap: Bootstrap,
    min_users: int = MIN_USERS,
) -> dict[str, GroupHarm]:
    """The mean gain of each group of users, and whether it is significantly harmed.

    Definition: per group the mean of the members' gains with its interval. A p-value is
    (1 + resampled means of at least 0) / (1 + resamples), and is corrected over all groups of
    the call by Holm's method. Range: that of the gain. Positive: the group is better off.

    With the usual number of resamples a corrected p-value could never be small, whatever the gains.
    The tests therefore use at least 4 times as many resamples as the smallest p-value needs.
    Percentile intervals of few users are too narrow. With 47 groups of pure noise, the smallest of
    12 users, a group counted as harmed after correction in 7 of 80 trials, where 2 were expected,
    and by its plain interval in 53. These errors are against our method.

    Args:
        gain: float64 [U], own minus reference; NaN for a user without one, who is left out.
        groupings: Name to a label per user [U]; see `groups.user_groupings`.
        bootstrap: The settings of the intervals.
        min_users: See `groups.members`.

    Returns:
        ``<grouping>_<label>`` to the result, in the order of ``groupings``.

    Raises:
        ConfigError: ``bootstrap`` or ``min_users`` is out of range.
        DataError: Lengths differ, two groups share a name, or a gain is infinite.
    """
    if min_users < 1:
        raise ConfigError(f"harm: min_users is {min_users}; set it to at least 1")
    by_group = _gains_by_group(np.asarray(gain, np.float64), groupings, min_users)
    level = (1 - bootstrap.confidence) / 2
    if level > 0:
        needed = math.ceil(_RESAMPLES_PER_TEST * len(by_group) / level)
        bootstrap = dataclasses.replace(
            bootstrap, num_resamples=max(needed, bootstrap.num_resamples)
        )
    estimates = {name: estimate(gains, bootstrap) for name, gains in by_group.items()}
    p_values = [_p_value(gains, bootstrap) for gains in by_group.values()]
    return {
        name: GroupHarm(
            gain=estimates[name],
            p_value=p_value,
            adjusted_p_value=adjusted,
            is_harmed=estimates[name].is_negative,
            is_harmed_adjusted=adjusted < level,
        )
        for name, p_value, adjusted in zip(
            by_group, p_values, holm(np.array(p_values)).tolist(), strict=True
        )
    }


def harm_figures(groups: Mapping[str, GroupHarm]) -> dict[str, Estimate]:
    """The groups' mean gains as named figures, ``harm_<grouping>_<label>``; positive is better."""
    return {f"harm_{name}": group.gain for name, group in groups.items()}


def _gains_by_group(
    gain: FloatArray, groupings: Mapping[str, Sequence[str]], min_users: int
) -> dict[str, FloatArray]:
    """Name of a group to the gains of the members who have a gain."""
    has_gain = ~np.isnan(gain)
    found: dict[str, FloatArray] = {}
    for grouping, labels in groupings.items():
        if gain.shape != (len(labels),):
            raise DataError(
                f"grouping {grouping}: {len(labels)} labels for {gain.shape} gains: give one each"
            )
        kept = [label for label, has in zip(labels, has_gain.tolist(), strict=True) if has]
        for label, positions in members(kept, min_users).items():
            name = f"{slug(grouping)}_{label}"
            if name in found:
                raise DataError(f"two groups are called {name}: rename a user field")
            found[name] = gain[has_gain][positions]
    return found


def _p_value(gains: FloatArray, bootstrap: Bootstrap) -> float:
    """One-sided bootstrap p-value of a mean of at least 0, in (0, 1].

    The resamples are those of `metrics.bootstrap_interval`, so that the two decisions agree.
    """
    means = resampled_means(gains, bootstrap.num_resamples, bootstrap.seed)
    num_not_below = int((means >= -ROUNDING).sum())
    return (1 + num_not_below) / (1 + bootstrap.num_resamples)
