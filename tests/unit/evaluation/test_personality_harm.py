"""Groups of users, and whether one of them is harmed; Holm's correction by brute force."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation import metrics
from pfm_llm.evaluation.personality.estimates import Bootstrap, Estimate, estimate, named_estimates
from pfm_llm.evaluation.personality.groups import age_band, deciles, members, slug, user_groupings
from pfm_llm.evaluation.personality.harm import _p_value, group_harm, harm_figures, not_harmed

FEW = Bootstrap(num_resamples=50, confidence=0.9, seed=3)
NAN = float("nan")


def test_deciles_hold_a_tenth_each_the_lowest_first() -> None:
    values = np.random.default_rng(0).permutation(50).astype(float)
    labels = deciles(values)
    for value, label in zip(values, labels, strict=True):
        assert label == str(int(value) // 5 + 1)
    assert deciles(values[:1]) == ["1"]
    assert deciles(np.zeros(0)) == []


def test_equal_values_share_a_decile_and_unknown_ones_have_none() -> None:
    # Six of ten are lowest: nobody is below them. Then 6, 7, 8 and 9 are below.
    assert deciles(np.array([0.0] * 6 + [1, 2, 3, 4])) == ["1"] * 6 + ["7", "8", "9", "10"]
    assert deciles(np.array([NAN, 2.0, NAN, 1.0])) == ["unknown", "6", "unknown", "1"]
    assert deciles(np.array([NAN])) == ["unknown"]
    with pytest.raises(DataError, match="give one per user"):
        deciles(np.ones((2, 2)))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60))
def test_deciles_follow_the_values_and_not_the_order(values) -> None:
    labels = deciles(np.array(values, float))
    by_value = dict(zip(values, labels, strict=True))
    assert [by_value[value] for value in values] == labels
    numbers = [int(by_value[value]) for value in sorted(by_value)]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1
    assert numbers[-1] <= 10
    assert deciles(np.array(values[::-1], float)) == labels[::-1]


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("0", "under 18"),
        ("17", "under 18"),
        ("17.9", "under 18"),
        ("18", "18-24"),
        ("24", "18-24"),
        ("25", "25-34"),
        ("34", "25-34"),
        ("35", "35-44"),
        ("44", "35-44"),
        ("45", "45-49"),
        ("49", "45-49"),
        ("50", "50-55"),
        ("55", "50-55"),
        ("56", "56+"),
        (" 73 ", "56+"),
        ("", "unknown"),
        ("  ", "unknown"),
        ("-1", "unknown"),
        ("nan", "unknown"),
        ("inf", "unknown"),
        ("25-34", "25-34"),
        ("under 18", "under 18"),
    ],
)
def test_ages_fall_into_bands(age, band) -> None:
    assert age_band(age) == band


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("F", "f"),
        ("under 18", "under_18"),
        ("<18", "under_18"),
        (">18", "over_18"),
        ("56+", "56_plus"),
        ("56", "56"),
        ("college/grad student", "college_grad_student"),
        ("K-12 student", "k_12_student"),
        ("_a_", "a"),
        ("Économie", "economie"),
        ("жена", "u436u435u43du430"),
        ("", "unknown"),
        (" - ", "unknown"),
    ],
)
def test_labels_become_names(label, name) -> None:
    assert slug(label) == name


@given(st.text())
def test_every_label_makes_a_name(label) -> None:
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", slug(label))
    assert slug(slug(label)) == slug(label)


def test_groupings_of_users() -> None:
    groupings = user_groupings(
        np.array([0.2, 0.1]), np.array([3, 9]), {"age": ("20", ""), "gender": ("F", "M")}
    )
    assert groupings == {
        "quality_decile": ["6", "1"],
        "activity_decile": ["1", "6"],
        "age": ["18-24", "unknown"],
        "gender": ["F", "M"],
    }
    with pytest.raises(DataError, match="'activity_decile': this name is taken"):
        user_groupings(np.ones(1), np.ones(1), {"activity_decile": ("1",)})


def test_small_groups_are_merged_and_left_out_when_still_small() -> None:
    labels = ["a"] * 3 + ["b"] * 2 + ["c"]
    assert {k: v.tolist() for k, v in members(labels, 3).items()} == {
        "a": [0, 1, 2],
        "other": [3, 4, 5],
    }
    assert list(members([*labels, "other"], 3)) == ["a", "other"]
    assert members([*labels, "other"], 3)["other"].tolist() == [3, 4, 5, 6]
    assert list(members(labels[:5], 3)) == ["a"]
    assert list(members(labels, 1)) == ["a", "b", "c"]
    assert members([], 1) == {}
    assert members(["K-12", "k 12"], 2)["k_12"].tolist() == [0, 1]


def test_groups_come_in_the_order_of_their_numbers() -> None:
    assert list(members(["10", "2", "1", "unknown"], 1)) == ["1", "2", "10", "unknown"]
    assert list(members(["56+", "18-24", "under 18"], 1)) == ["under_18", "18_24", "56_plus"]


def test_the_share_of_users_not_worse_off() -> None:
    gain = np.array([0.5, 0.0, -0.1, -0.3, NAN])
    assert not_harmed(gain, FEW)["not_harmed"].value == 2 / 4

    assert not_harmed(gain, FEW)["not_harmed"].num_users == 4
    assert not_harmed(np.array([-1e-17]), FEW)["not_harmed"] == Estimate(1, 1, 1, 1)

    with pytest.raises(DataError, match="no user has a value"):
        not_harmed(np.array([NAN]), FEW)


def test_one_harmed_group_is_found_among_others() -> None:
    random = np.random.default_rng(0)
    gain = random.normal(0.2, 0.1, 90)
    gain[30:60] -= 0.4
    labels = ["a"] * 30 + ["B b"] * 30 + ["c"] * 30
    groups = group_harm(gain, {"field": labels}, Bootstrap())
    assert list(groups) == ["field_a", "field_b_b", "field_c"]
    assert [g.is_harmed for g in groups.values()] == [False, True, False]
    assert [g.is_harmed_adjusted for g in groups.values()] == [False, True, False]
    assert groups["field_b_b"].gain.value == pytest.approx(gain[30:60].mean())
    assert groups["field_b_b"].p_value < 0.001
    assert groups["field_a"].p_value > 0.999
    assert harm_figures(groups) == {f"harm_{name}": group.gain for name, group in groups.items()}
    named_estimates(harm_figures(groups))


def test_the_correction_spares_a_group_that_the_plain_interval_accuses() -> None:
    # Mean -0.22 at a standard error of 0.1 or so: accused alone, not one of 40.
    accused = np.random.default_rng(0).normal(0, 0.5, 25)
    accused = accused - accused.mean() - 0.22
    gain = np.concatenate([accused, np.random.default_rng(1).normal(0.5, 0.1, 975)])
    labels = [str(n // 25) for n in range(1000)]
    alone = group_harm(accused, {"g": labels[:25]}, Bootstrap())["g_0"]
    assert alone.is_harmed
    assert alone.is_harmed_adjusted
    assert alone.p_value == alone.adjusted_p_value
    groups = group_harm(gain, {"g": labels}, Bootstrap())
    assert groups["g_0"].is_harmed
    assert not groups["g_0"].is_harmed_adjusted
    assert groups["g_0"].adjusted_p_value == pytest.approx(40 * groups["g_0"].p_value)


def test_the_correction_can_still_accuse_with_many_groups_and_few_resamples() -> None:
    gain = np.tile([-1.0, -0.9], 500)
    groups = group_harm(gain, {"g": [str(n // 10) for n in range(1000)]}, FEW)
    assert len(groups) == 100
    assert all(group.is_harmed_adjusted for group in groups.values())


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(-0.6, 0.2))
def test_the_corrected_decision_never_accuses_whom_the_interval_does_not(seed, mean) -> None:
    gain = np.random.default_rng(seed).normal(mean, 1, 60)
    groups = group_harm(gain, {"g": ["a", "b", "c"] * 20}, FEW)
    for group in groups.values():
        assert group.is_harmed or not group.is_harmed_adjusted
        assert 0 < group.p_value <= group.adjusted_p_value <= 1


def test_p_values_count_the_resamples_of_the_interval(monkeypatch) -> None:
    gains = np.random.default_rng(0).normal(-0.1, 1, 40)
    p_value = _p_value(gains, Bootstrap(num_resamples=999))
    # The upper end at 1 - count / 998 is the resampled mean with ``count`` above it.
    not_below = round(p_value * 1000) - 1
    for count, is_below in ((not_below - 1, False), (not_below + 1, True)):
        high = metrics.bootstrap_interval(gains, 999, 1 - 2 * count / 998, 0)[1]
        assert (high < 0) == is_below
    monkeypatch.setattr("pfm_llm.evaluation.metrics._DRAWS_AT_ONCE", 130)  # 3 of 999 resamples
    assert _p_value(gains, Bootstrap(num_resamples=999)) == p_value


def test_no_gain_is_no_harm() -> None:
    group = group_harm(np.zeros(10), {"g": ["a"] * 10}, FEW)["g_a"]
    assert (group.is_harmed, group.p_value) == (False, 1.0)
    assert not group_harm(np.full(10, -1e-17), {"g": ["a"] * 10}, FEW)["g_a"].is_harmed


def test_users_without_a_gain_belong_to_no_group() -> None:
    gain = np.array([NAN, 1.0, 2.0, NAN])
    groups = group_harm(gain, {"g": ["a", "a", "b", "b"]}, FEW, min_users=1)
    assert {name: group.gain.value for name, group in groups.items()} == {"g_a": 1, "g_b": 2}
    assert group_harm(np.array([NAN]), {"g": ["a"]}, FEW) == {}
    assert group_harm(np.zeros(0), {"g": []}, FEW) == {}
    assert group_harm(np.ones(9), {"g": ["a"] * 9}, FEW) == {}
    assert group_harm(np.ones(9), {}, FEW) == {}


def test_groups_do_not_depend_on_the_order_of_users() -> None:
    random = np.random.default_rng(5)
    gain, quality = random.normal(size=300), random.integers(0, 40, 300).astype(float)
    order = random.permutation(300)
    there = group_harm(gain, {"q": deciles(quality)}, Bootstrap())
    again = group_harm(gain[order], {"q": deciles(quality[order])}, Bootstrap())
    assert list(there) == list(again)
    for name, group in there.items():
        assert again[name].gain.value == pytest.approx(group.gain.value)
        assert again[name].gain.num_users == group.gain.num_users


def test_groups_of_harm_refuse_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="grouping g: 2 labels for"):
        group_harm(np.ones(3), {"g": ["a", "b"]}, FEW)
    with pytest.raises(DataError, match="two groups are called a_b_c"):
        group_harm(np.ones(1), {"a": ["b c"], "a b": ["c"]}, FEW, min_users=1)
    with pytest.raises(ConfigError, match="min_users is 0"):
        group_harm(np.ones(1), {"a": ["b"]}, FEW, min_users=0)


def test_the_interval_of_a_group_is_that_of_its_members() -> None:
    gain = np.random.default_rng(0).normal(size=20)
    found = group_harm(gain, {"g": ["a", "b"] * 10}, Bootstrap(num_resamples=5000))
    assert found["g_b"].gain == estimate(gain[1::2], Bootstrap(num_resamples=5000))
