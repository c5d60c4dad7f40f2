"""Gain, swap and curves against hand arithmetic; signs, ties, NaN and single users."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation import metrics
from pfm_llm.evaluation.personality.curves import MEMORY, curve_figures, over_longer, over_none
from pfm_llm.evaluation.personality.estimates import (
    RANK_QUALITIES,
    Bootstrap,
    Estimate,
    align,
    estimate,
    named_estimates,
    paired_difference,
    user_quality,
)
from pfm_llm.evaluation.personality.gain import auc_gain, rank_gain
from pfm_llm.evaluation.personality.new_items import new_item_figures
from pfm_llm.evaluation.personality.swap import identification, swap_loss

FEW = Bootstrap(num_resamples=50, confidence=0.9, seed=3)
NAN = math.nan
RANK_LISTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 99), st.integers(1, 99)), min_size=1
)


def test_an_estimate_is_the_mean_with_the_interval_of_the_metrics() -> None:
    values = np.random.default_rng(0).random(40)
    low, high = metrics.bootstrap_interval(values, 50, 0.9, 3)
    assert estimate(values, FEW) == Estimate(float(values.mean()), low, high, 40)


def test_users_without_a_value_are_left_out() -> None:
    assert estimate(np.array([NAN, 1.0, NAN, 3.0]), FEW) == estimate(np.array([1.0, 3.0]), FEW)
    assert estimate(np.array([NAN, 1.0, 3.0]), FEW).num_users == 2


def test_one_user_has_a_point_for_an_interval() -> None:
    assert estimate(np.array([0.5]), FEW) == Estimate(0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_no_values_are_an_error_and_not_a_zero(values) -> None:
    with pytest.raises(DataError, match="no user has a value"):
        estimate(np.array(values), FEW)


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(DataError, match="one finite value"):
        estimate(np.array([1.0, math.inf]), FEW)
    with pytest.raises(DataError, match=r"shape \(1, 1\): give one per user"):
        estimate(np.ones((1, 1)), FEW)
    with pytest.raises(ConfigError, match="bootstrap"):
        estimate(np.ones(2), Bootstrap(num_resamples=0))


def test_only_a_whole_interval_beyond_0_counts() -> None:
    assert Estimate(1, 0.5, 2, 3).is_positive
    assert not Estimate(1, 0.5, 2, 3).is_negative
    assert Estimate(-1, -2, -0.5, 3).is_negative
    assert not Estimate(-1, -2, -0.5, 3).is_positive
    for around_zero in (Estimate(1, 0.0, 2, 3), Estimate(-1, -2, 0, 3), Estimate(0, -1, 1, 3)):
        assert not around_zero.is_positive
        assert not around_zero.is_negative
    rounding = Estimate(1e-17, 1e-17, 1e-17, 3)
    assert not rounding.is_positive


def test_a_paired_difference_equals_that_of_the_metrics_and_turns_its_sign() -> None:
    own, reference = np.random.default_rng(1).random((2, 30))
    found = paired_difference(own, reference, FEW)
    assert found.value == pytest.approx((own - reference).mean())
    assert (found.ci_low, found.ci_high) == pytest.approx(
        metrics.bootstrap_interval(own - reference, 50, 0.9, 3)
    )
    turned = paired_difference(reference, own, FEW)
    assert (turned.value, turned.ci_low, turned.ci_high) == pytest.approx(
        (-found.value, -found.ci_high, -found.ci_low)
    )


def test_a_paired_difference_is_seen_that_apart_drowns_in_noise() -> None:
    base = np.random.default_rng(0).random(200)
    better = base + 0.01 + 0.001 * (np.arange(200) % 2)  # mean gain 0.0105, hardly any noise
    found = paired_difference(better, base, Bootstrap(500))
    assert found.value == pytest.approx(0.0105)
    assert 0.01 < found.ci_low < found.value < found.ci_high < 0.011
    apart = [metrics.bootstrap_interval(values, 500, 0.95, 0) for values in (better, base)]
    assert apart[0][0] < apart[1][1]


def test_pairs_need_both_values_and_equal_lengths() -> None:
    found = paired_difference(np.array([1.0, NAN, 5.0]), np.array([0.0, 1.0, NAN]), FEW)
    assert found == Estimate(1.0, 1.0, 1.0, 1)
    with pytest.raises(DataError, match="give the same users"):
        paired_difference(np.ones(3), np.ones(1), FEW)


def test_qualities_by_hand() -> None:
    ranks, users = np.array([1, 8, 2, 11]), np.array([5, 5, 2, 2])
    # Users ascending: user 2 has ranks 2 and 11, user 5 has 1 and 8.
    assert user_quality("log_rank", ranks, users).tolist() == pytest.approx(
        [-(math.log(2) + math.log(11)) / 2, -math.log(8) / 2]
    )
    assert user_quality("ndcg", ranks, users).tolist() == pytest.approx(
        [(1 / math.log2(3) + 0) / 2, (1 + 1 / math.log2(9)) / 2]
    )


@pytest.mark.parametrize("quality", RANK_QUALITIES)
def test_a_better_rank_is_a_higher_quality_and_a_rank_below_1_an_error(quality) -> None:
    better, worse = (user_quality(quality, np.array([r]), np.array([0]))[0] for r in (3, 9))
    assert better > worse
    with pytest.raises(DataError, match="ranks begin at 1"):
        user_quality(quality, np.array([0]), np.array([0]))
    with pytest.raises(ConfigError, match="unknown quality 'speed'; valid: log_rank, ndcg"):
        user_quality("speed", np.array([1]), np.array([0]))


def test_values_move_to_another_order_of_users() -> None:
    moved = align(np.array([1.0, 2.0, 3.0]), np.array([7, 2, 9]), np.array([9, 4, 7]))
    assert moved.tolist() == pytest.approx([3.0, NAN, 1.0], nan_ok=True)
    assert align(np.zeros(0), np.zeros(0, int), np.array([1])).tolist() == pytest.approx(
        [NAN], nan_ok=True
    )
    with pytest.raises(DataError, match="two values"):
        align(np.ones(2), np.array([4, 4]), np.array([4]))
    with pytest.raises(DataError, match="give one each"):
        align(np.ones(2), np.array([4]), np.array([4]))


def test_rank_gain_by_hand() -> None:
    users = np.array([0, 0, 1])
    own, reference = np.array([1, 4, 20]), np.array([2, 4, 10])
    found = rank_gain(own, reference, users, FEW)
    # User 0: (ln 2 - ln 1 + 0) / 2; user 1: ln 10 - ln 20. NDCG: (1 - 1/log2(3)) / 2, and
    # 0 - 1/log2(11).
    assert found["gain_log_rank"].value == pytest.approx((math.log(2) / 2 - math.log(2)) / 2)
    assert found["gain_ndcg"].value == pytest.approx(
        ((1 - 1 / math.log2(3)) / 2 - 1 / math.log2(11)) / 2
    )
    assert {e.num_users for e in found.values()} == {2}


def test_names_say_what_a_gain_is_over() -> None:
    one = (np.array([1]), np.array([2]), np.array([0]), FEW)
    assert list(rank_gain(*one)) == ["gain_log_rank", "gain_ndcg"]
    assert list(rank_gain(*one, over="private")) == [
        "gain_log_rank_over_private",
        "gain_ndcg_over_private",
    ]
    assert list(auc_gain(np.ones(1), np.ones(1), FEW)) == ["gain_auc"]
    assert list(auc_gain(np.ones(1), np.ones(1), FEW, "private")) == ["gain_auc_over_private"]


@given(RANK_LISTS)
def test_gains_are_in_their_range_turn_with_the_roles_and_ignore_order(targets) -> None:
    users, own, reference = (np.array(column) for column in zip(*targets, strict=True))
    found = rank_gain(own, reference, users, FEW)
    assert abs(found["gain_log_rank"].value) <= math.log(99)
    assert abs(found["gain_ndcg"].value) <= 1
    turned = rank_gain(reference, own, users, FEW)
    order = np.random.default_rng(0).permutation(len(users))
    shuffled = rank_gain(own[order], reference[order], users[order], FEW)
    for name, value in found.items():
        assert turned[name].value == pytest.approx(-value.value)
        for field in ("value", "ci_low", "ci_high", "num_users"):
            assert getattr(shuffled[name], field) == pytest.approx(getattr(value, field))


def test_the_order_of_users_changes_no_value() -> None:
    random = np.random.default_rng(2)
    own, reference, served = random.random(200), random.random(200), random.random((200, 4))
    order = random.permutation(200)
    many = Bootstrap(num_resamples=4000)
    for whole, shuffled in (
        (auc_gain(own, reference, many), auc_gain(own[order], reference[order], many)),
        (swap_loss("auc", served, many), swap_loss("auc", served[order], many)),
        (identification(served, many), identification(served[order], many)),
    ):
        for name, value in whole.items():
            assert shuffled[name].value == pytest.approx(value.value)
            # The resamples are others, so the interval moves by their noise alone.
            assert shuffled[name].ci_low == pytest.approx(value.ci_low, abs=0.01)


def test_auc_gain_leaves_out_users_without_both_labels() -> None:
    found = auc_gain(np.array([0.9, NAN, 0.5]), np.array([0.6, NAN, 0.6]), FEW)["gain_auc"]
    assert found.value == pytest.approx((0.3 - 0.1) / 2)
    assert found.num_users == 2


def test_swap_by_hand() -> None:
    served = np.array([[5.0, 1, 3], [2, 4, 0], [NAN, 9, 9], [9, NAN, 9]])
    # User 0: 5 - 2, user 1: 2 - 2; the rows with NaN are left out.
    found = swap_loss("log_rank", served, FEW)["swap_log_rank"]
    assert (found.value, found.num_users) == (1.5, 2)
    # User 0 is identified, user 1 is not: a stranger has 4.
    found = identification(served, FEW)["identification"]
    assert (found.value, found.num_users) == (0.5, 2)


def test_a_tie_is_no_identification_not_even_by_rounding() -> None:
    assert identification(np.array([[1.0, 1.0, 0.0]]), FEW)["identification"].value == 0
    assert identification(np.array([[0.3, 0.1 + 0.2]]), FEW)["identification"].value == 0
    assert identification(np.array([[0.1 + 0.2, 0.3]]), FEW)["identification"].value == 0
    assert identification(np.array([[0.31, 0.3]]), FEW)["identification"].value == 1


def test_interchangeable_adapters_lose_nothing_and_are_identified_by_chance() -> None:
    # Each of ten qualities is the own one for as many users, so no adapter is special.
    served = np.stack([np.roll(np.arange(10) / 10, shift) for shift in range(10)] * 20)
    loss = swap_loss("auc", served, Bootstrap())["swap_auc"]
    assert loss.value == pytest.approx(0)
    assert loss.ci_low < 0 < loss.ci_high
    found = identification(served, Bootstrap())["identification"]
    assert found.value == pytest.approx(1 / 10)
    equal = np.full((4, 7), 0.1)
    assert not swap_loss("auc", equal, FEW)["swap_auc"].is_positive


def test_a_stranger_that_serves_better_makes_the_swap_negative() -> None:
    served = np.array([[0.2, 0.6], [0.1, 0.3]])
    assert swap_loss("auc", served, FEW)["swap_auc"].is_negative
    assert identification(served, FEW)["identification"].value == 0


@pytest.mark.parametrize("served", [np.ones((3, 1)), np.ones(3), np.ones((2, 2, 2))])
def test_a_swap_needs_strangers(served) -> None:
    for measure in (lambda: swap_loss("auc", served, FEW), lambda: identification(served, FEW)):
        with pytest.raises(DataError, match="at least 1 stranger"):
            measure()


def test_a_swap_needs_users() -> None:
    for served in (np.zeros((0, 3)), np.array([[NAN, 1.0]])):
        with pytest.raises(DataError, match="no user has all qualities"):
            identification(served, FEW)


def test_a_curve_by_hand() -> None:
    own = {8: np.array([0.5, 0.7, NAN]), 4: np.array([0.4, 0.6, 0.9])}
    shared = {4: np.array([0.1, 0.2, NAN]), 8: np.array([0.5, 0.5, 0.1])}
    figures = curve_figures(MEMORY, own, shared, FEW)
    # At 4: gains 0.3 and 0.4; the third user has no shared value and is in no mean.
    assert {name: figure.value for name, figure in figures.items()} == {
        "memory_4": pytest.approx(0.35),
        "memory_4_shared": pytest.approx(0.15),
        "memory_4_own": pytest.approx(0.5),
        "memory_8": pytest.approx(0.1),
        "memory_8_shared": pytest.approx(0.5),
        "memory_8_own": pytest.approx(0.6),
    }
    assert next(iter(figures)) == "memory_4"
    assert {figure.num_users for figure in figures.values()} == {2}


def test_new_items_by_hand() -> None:
    """User 4 has two new targets, user 7 none, user 9 one; its rank is the best of three."""
    figures = new_item_figures(
        own=np.array([1, 4, 2, 5, 1]),
        shared=np.array([2, 4, 8, 1, 3]),
        users=np.array([4, 4, 4, 7, 9]),
        num_candidates=np.array([10, 10, 10, 10, 3]),
        is_new=np.array([True, False, True, False, True]),
        bootstrap=FEW,
    )
    assert {figure.num_users for figure in figures.values()} == {2}
    log = math.log
    assert figures["new_items_own"].value == pytest.approx(-log(2) / 4)
    assert figures["new_items_shared"].value == pytest.approx((-log(16) / 2 - log(3)) / 2)
    gain = figures["new_items_own"].value - figures["new_items_shared"].value
    assert figures["new_items"].value == pytest.approx(gain)
    chance = (-math.lgamma(11) / 10 - math.lgamma(4) / 3) / 2
    over = figures["new_items_own"].value - chance
    assert figures["new_items_over_chance"].value == pytest.approx(over)


def test_without_a_new_item_there_is_nothing_to_say() -> None:
    ones, none = np.ones(2, int), np.zeros(2, bool)
    assert new_item_figures(ones, ones, ones, ones, none, FEW) == {}
    with pytest.raises(DataError, match=r"lengths \[1, 2\]"):
        new_item_figures(ones, ones, ones, ones[:1], none, FEW)


def test_a_curve_needs_both_at_every_point_and_may_be_empty() -> None:
    assert curve_figures(MEMORY, {}, {}, FEW) == {}
    with pytest.raises(DataError, match=r"at \[4\] items and without it at \[4, 8\]"):
        curve_figures(MEMORY, {4: np.ones(1)}, {4: np.ones(1), 8: np.ones(1)}, FEW)
    with pytest.raises(DataError, match="give the same users"):
        curve_figures(MEMORY, {0: np.ones(2)}, {0: np.ones(1)}, FEW)


def test_figures_are_merged_under_names_of_their_own() -> None:
    a, b = Estimate(1, 0, 2, 3), Estimate(2, 1, 3, 3)
    assert list(named_estimates({"z_1": a}, {}, {"a_2": b})) == ["z_1", "a_2"]
    assert named_estimates() == {}
    with pytest.raises(DataError, match="two figures are called x"):
        named_estimates({"x": a}, {"x": a})
    for name in ("gain_over_Shared", "a b", "", "ü"):
        with pytest.raises(DataError, match="a-z, 0-9 and _"):
            named_estimates({name: a})


def test_few_items_with_the_private_part_beside_more_without() -> None:
    own = {16: np.array([3.0, 4.0]), 4: np.array([1.0, 2.0]), 8: np.array([2.0, 2.0])}
    shared = {16: np.array([1.0, 0.0]), 4: np.array([0.0, 0.0]), 8: np.array([3.0, 2.0])}
    found = over_longer(own, shared, FEW)
    assert {name: figure.value for name, figure in found.items()} == {
        "memory_4_over_8": -1.0,
        "memory_4_over_16": 1.0,
    }


def test_what_is_known_is_worth_what_it_adds_to_nothing() -> None:
    own = {0: np.array([1.0, 2.0]), 5: np.array([3.0, 3.0])}
    shared = {0: np.array([1.0, 2.0]), 5: np.array([0.0, 2.0])}
    found = over_none(own, shared, FEW)
    assert {name: figure.value for name, figure in found.items()} == {
        "cold_start_5_over_none": 1.5,
        "cold_start_5_over_none_shared": -0.5,
    }
