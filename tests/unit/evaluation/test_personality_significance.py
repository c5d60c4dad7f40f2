"""Intervals over users and seeds cover the truth; Holm's correction is the procedure as told."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.personality.significance import Figure, holm, over_seeds, settled

NAN = float("nan")
Z95 = 1.959964
NUMBERS = st.floats(-1, 1)
HALVES = st.floats(0.001, 1)


@dataclass(frozen=True)
class Seed:
    """A figure of one seed."""

    value: float
    ci_low: float
    ci_high: float


def seed(value: float, half: float) -> Seed:
    return Seed(value, value - half, value + half)


@given(NUMBERS, HALVES, HALVES)
def test_one_seed_keeps_its_interval(value: float, below: float, above: float) -> None:
    found = over_seeds([Seed(value, value - below, value + above)], 0.95)
    assert (found.value, found.low, found.high) == pytest.approx(
        (value, value - below, value + above)
    )


def test_seeds_that_agree_have_the_mean_of_their_intervals() -> None:
    found = over_seeds([Seed(0.2, 0.1, 0.4), Seed(0.2, 0.14, 0.3)], 0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.12, 0.35))


def test_seeds_that_differ_widen_it() -> None:
    """With e = .01 and means .1, .2, .3: V = .01² + .01/3, df = 2 V² / (.01/3)² = 2.12.

    The 97.5 % point of t with 2.12 degrees of freedom is 4.0744.
    """
    found = over_seeds([seed(value, 0.01 * Z95) for value in (0.1, 0.2, 0.3)], 0.95)
    half = 4.0744 * (0.0001 + 0.01 / 3) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.2, 0.2 - half, 0.2 + half), abs=1e-4
    )


@example([(0.0, 1.0), (3e-151, 1.0)], 0.5)  # the variance over seeds has a square of zero
@given(st.lists(st.tuples(NUMBERS, HALVES), min_size=1, max_size=5), st.floats(0.5, 0.99))
def test_it_is_never_narrower_than_the_mean_and_agrees_with_its_test(found, confidence) -> None:
    seeds = [seed(value, half) for value, half in found]
    whole = over_seeds(seeds, confidence)
    assert whole.low <= np.mean([one.ci_low for one in seeds]) + 1e-9
    assert whole.high >= np.mean([one.ci_high for one in seeds]) - 1e-9
    nearest = min(abs(whole.low), abs(whole.high))
    if nearest > 1e-6:
        assert (whole.p_value < 1 - confidence) is (whole.low > 0 or whole.high < 0)


def test_a_difference_without_any_spread_is_settled_unless_it_is_none() -> None:
    assert over_seeds([seed(0.0, 0.0)] * 3, 0.95) == Figure(0, 0, 0, 1)
    assert over_seeds([seed(1e-17, 0.0)] * 2, 0.95).p_value == 1
    assert over_seeds([seed(0.1, 0.0)], 0.95).p_value == 0
    two = over_seeds([seed(0.1, 0.0), seed(0.3, 0.0)], 0.95)  # t with 1 degree of freedom, s² = .02
    assert (two.low, two.high) == pytest.approx((0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1), abs=1e-3)


def test_it_covers_the_truth_where_users_and_seeds_are_crossed() -> None:
    """1000 worlds of 100 users and 3 seeds, with effects of users, of seeds, and of both."""
    rng = np.random.default_rng(0)
    covered, narrow = 0, 0
    for _ in range(1000):
        of_users, of_seeds = rng.normal(0, 1, (100, 1)), rng.normal(0, 0.15, (1, 3))
        values = of_users + of_seeds + rng.normal(0, 0.5, (100, 3))
        halves = Z95 * values.std(axis=0, ddof=1) / 10
        seeds = [seed(*one) for one in zip(values.mean(axis=0), halves, strict=True)]
        whole = over_seeds(seeds, 0.95)
        covered += whole.low <= 0 <= whole.high
        narrow += np.mean([s.ci_low for s in seeds]) <= 0 <= np.mean([s.ci_high for s in seeds])
    assert covered >= 0.94 * 1000
    assert narrow < 0.92 * 1000  # the mean of the ends, which looks at users alone, is too narrow


@pytest.mark.parametrize(("seeds", "confidence"), [([], 0.95), ([seed(0, 1)], 1.0)])
def test_what_has_no_interval_is_refused(seeds, confidence) -> None:
    with pytest.raises(DataError, match="one seed at least"):
        over_seeds(seeds, confidence)


def test_settled_differences_are_those_after_holm() -> None:
    """A difference of p = .02 is settled alone and among three, and not among four."""
    figures = {name: Figure(1, 0, 2, p) for name, p in (("a", 0.02), ("b", 0.001), ("c", 0.03))}
    assert settled({"a": figures["a"]}, 0.95) == {"a"}
    assert settled(figures, 0.95) == {"a", "b", "c"}  # .003, .04, .04
    assert settled({**figures, "d": Figure(1, 0, 2, 0.9)}, 0.95) == {"b"}  # .004, .06, .06, .9
    assert settled({}, 0.95) == set()


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4, 3, 2, 1: .04 .06 .06 .04, then never falling.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])).tolist() == pytest.approx(
        [0.06, 0.04, 0.06, 0.06]
    )
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert holm(np.zeros(0)).shape == (0,)
    for bad in (-0.1, 1.1, NAN):
        with pytest.raises(DataError, match="not between 0 and 1"):
            holm(np.array([bad]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_equals_stepping_down(p_values, level) -> None:
    """The procedure as it is told: reject the smallest while it is below level / remaining."""
    rejected = set()
    for remaining, index in zip(
        range(len(p_values), 0, -1), np.argsort(p_values, kind="stable"), strict=True
    ):
        if p_values[index] * remaining >= level:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(holm(np.array(p_values)) < level).tolist()) == rejected
