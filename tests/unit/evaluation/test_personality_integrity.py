"""Rank-biased overlap against values by hand and the sum that it extrapolates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.personality.estimates import Bootstrap
from pfm_llm.evaluation.personality.integrity import PERSISTENCE, integrity, rank_biased_overlap

FEW = Bootstrap(num_resamples=50)
PAIRS = st.integers(1, 12).flatmap(
    lambda k: st.tuples(
        *(st.permutations(range(k + 5)).map(lambda order, k=k: order[:k]) for _ in range(2))
    )
)


def overlap(old, new, persistence=PERSISTENCE) -> float:
    return float(rank_biased_overlap(np.array([old]), np.array([new]), persistence)[0])


def infinite_sum(old, new, persistence) -> float:
    """Equation 4 of the paper, (1 - p) sum of p^(d-1) A_d, summed to a great depth.

    Extrapolation assumes that the agreement A_k seen last goes on for ever.
    """
    total, agreement = 0.0, 0.0
    for depth in range(1, 3000):
        if depth <= len(old):
            agreement = len(set(old[:depth]) & set(new[:depth])) / depth
        total += (1 - persistence) * persistence ** (depth - 1) * agreement
    return total


def test_known_values() -> None:
    assert overlap([3, 1, 2], [3, 1, 2]) == pytest.approx(1)
    assert overlap([3, 1, 2], [4, 5, 6]) == 0
    assert overlap([7], [7]) == pytest.approx(1)
    assert overlap([7], [8]) == 0
    # Two swapped: X = 0, 2: 1 p^2 + (1 - p) / p (0 + 1 p^2) = p^2 + (1 - p) p = p.
    assert overlap([1, 2], [2, 1], 0.9) == pytest.approx(0.9)
    assert overlap([1, 2], [2, 1], 0.3) == pytest.approx(0.3)
    # First equal, second not: X = 1, 1: p^2 / 2 + (1 - p) (1 + p / 2) = 1 - p / 2.
    assert overlap([1, 2], [1, 3], 0.9) == pytest.approx(0.55)


@given(PAIRS, st.sampled_from([0.2, 0.5, 0.9]))
def test_the_overlap_is_the_sum_of_the_agreements(pair, persistence) -> None:
    old, new = pair
    assert overlap(old, new, persistence) == pytest.approx(infinite_sum(old, new, persistence))


@given(PAIRS)
def test_the_overlap_is_symmetric_and_between_0_and_1(pair) -> None:
    old, new = pair
    assert overlap(old, new) == pytest.approx(overlap(new, old))
    assert 0 <= overlap(old, new) <= 1 + 1e-12
    assert overlap(old, old) == pytest.approx(1)


def test_the_first_places_count_most() -> None:
    top, bottom = [2, 1, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5]
    assert overlap([1, 2, 3, 4, 5, 6], top) < overlap([1, 2, 3, 4, 5, 6], bottom) < 1


def test_persistence_gives_the_first_10_places_the_weight_that_is_claimed() -> None:
    # Webber et al. 2010: 1 - p^9 + (1 - p) / p 10 (ln(1 / (1 - p)) - sum of p^i / i to 9).
    p = PERSISTENCE
    tail = math.log(1 / (1 - p)) - sum(p**i / i for i in range(1, 10))
    assert round(1 - p**9 + (1 - p) / p * 10 * tail, 2) == 0.86


def test_each_user_has_an_overlap_of_the_own_lists() -> None:
    before, after = np.array([[1, 2], [5, 6], [1, 2]]), np.array([[1, 2], [7, 8], [2, 1]])
    assert rank_biased_overlap(before, after).tolist() == pytest.approx([1, 0, 0.9])
    found = integrity(before, after, FEW)
    assert list(found) == ["integrity_rbo"]
    assert found["integrity_rbo"].value == pytest.approx(1.9 / 3)
    assert found["integrity_rbo"].num_users == 3
    assert list(integrity(before, after, FEW, retuned=True)) == ["integrity_rbo_retuned"]


def test_what_is_no_pair_of_rankings_is_refused() -> None:
    for before, after in (([[1, 2]], [[1]]), ([1, 2], [1, 2]), ([[]], [[]]), ([[1]], [[1], [2]])):
        with pytest.raises(DataError, match="two lists of equal length"):
            rank_biased_overlap(np.array(before), np.array(after))
    for pair in (([[1, 2], [4, 4]], [[1, 2], [4, 5]]), ([[1, 2], [4, 5]], [[1, 2], [4, 4]])):
        with pytest.raises(DataError, match="row 1: an item comes twice"):
            rank_biased_overlap(*map(np.array, pair))
    for persistence in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="persistence"):
            rank_biased_overlap(np.array([[1]]), np.array([[1]]), persistence)
    with pytest.raises(DataError, match="no user has a value"):
        integrity(np.zeros((0, 3), int), np.zeros((0, 3), int), FEW)
