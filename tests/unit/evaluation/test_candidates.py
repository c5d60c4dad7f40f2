"""Tests of pfm_llm.evaluation.candidates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation.candidates import PADDING, sample_negatives
from tests.support.queries import held_out_of


@st.composite
def some_held_out(draw: st.DrawFn) -> tuple[HeldOut, int]:
    num_items = draw(st.integers(2, 30))
    histories, targets = [], []
    for _ in range(draw(st.integers(1, 5))):
        order = draw(st.permutations(range(num_items)))
        cut = draw(st.integers(1, num_items - 1))
        end = draw(st.integers(cut + 1, num_items))
        histories.append(order[:cut])
        targets.append(order[cut:end])
    return held_out_of(histories, targets), num_items


@given(some_held_out(), st.integers(0, 12))
def test_negatives_are_distinct_unseen_and_no_target(
    case: tuple[HeldOut, int], num_negatives: int
) -> None:
    """Each row: distinct items of the rest of the catalogue, padded only when it is used up."""
    queries, num_items = case
    negatives = sample_negatives(queries, num_items, num_negatives, seed=3)
    assert negatives.dtype == np.int32
    assert negatives.shape == (sum(map(len, queries.targets)), num_negatives)
    row = 0
    for history, targets in zip(queries.histories, queries.targets, strict=True):
        rest = set(range(num_items)) - set(history.tolist()) - set(targets.tolist())
        for _ in targets:
            drawn = negatives[row][negatives[row] != PADDING].tolist()
            assert len(drawn) == len(set(drawn)) == min(num_negatives, len(rest))
            assert set(drawn) <= rest
            assert np.all(negatives[row, len(drawn) :] == PADDING)
            row += 1


def test_small_catalogue_gives_all_that_remain_then_padding() -> None:
    """Of 6 items, 0 1 are seen and 2 is the target: 3 4 5 remain for 5 places."""
    row = sample_negatives(held_out_of([[0, 1]], [[2]]), 6, 5, seed=0)[0]
    assert sorted(row[:3].tolist()) == [3, 4, 5]
    assert row[3:].tolist() == [PADDING, PADDING]


def test_nothing_remaining_is_all_padding() -> None:
    assert sample_negatives(held_out_of([[0]], [[1]]), 2, 3, seed=0).tolist() == [[PADDING] * 3]


def test_same_seed_same_negatives_other_seed_others() -> None:
    queries = held_out_of([[0, 1]], [[2]])
    first = sample_negatives(queries, 1000, 99, seed=1)
    np.testing.assert_array_equal(first, sample_negatives(queries, 1000, 99, seed=1))
    assert not np.array_equal(first, sample_negatives(queries, 1000, 99, seed=2))


def test_validation_test_and_each_target_draw_apart() -> None:
    """99 of 998: two independent draws share about 10 items; equal ones would share 99."""
    as_test = sample_negatives(held_out_of([[0]], [[1]]), 1000, 99, seed=1)
    as_validation = sample_negatives(held_out_of([[0]], [[1]], name="validation"), 1000, 99, seed=1)
    assert len(np.intersect1d(as_test, as_validation)) < 40
    first, second = sample_negatives(held_out_of([[0]], [[1, 2]]), 1000, 99, seed=1)
    assert len(np.intersect1d(first, second)) < 40


def test_a_users_negatives_do_not_depend_on_other_users() -> None:
    both = sample_negatives(held_out_of([[0], [4]], [[1], [5]], users=[3, 8]), 500, 20, seed=1)
    alone = sample_negatives(held_out_of([[4]], [[5]], users=[8]), 500, 20, seed=1)
    np.testing.assert_array_equal(both[1:], alone)


@pytest.mark.parametrize("num_users", [2000])
def test_every_allowed_item_is_drawn_equally_often(num_users: int) -> None:
    """8 of 10 items allowed, 2 drawn: each with chance 1/4, so 500 of 2,000 (sd 19.4)."""
    queries = held_out_of([[0]] * num_users, [[1]] * num_users)
    counts = np.bincount(sample_negatives(queries, 10, 2, seed=5).ravel(), minlength=10)
    assert counts[:2].tolist() == [0, 0]
    assert np.all(np.abs(counts[2:] - 500) < 5 * 19.4)
