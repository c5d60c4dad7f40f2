"""The study of new items: who lends a history to whom."""

import numpy as np
import pytest

from pfm_llm.data.splits import HeldOut
from pfm_llm.runs.study.new_items import _lenders


def _held_out(histories: list[list[int]], targets: list[list[int]]) -> HeldOut:
    return HeldOut(
        name="test",
        users=np.arange(len(histories)),
        histories=tuple(np.array(own, np.int32) for own in histories),
        history_ratings=None,
        targets=tuple(np.array(own, np.int32) for own in targets),
        num_dropped=0,
        num_repeated_targets=0,
    )


def test_each_user_gets_the_history_of_the_one_before_without_what_is_asked() -> None:
    held_out = _held_out([[1, 2], [3, 4], [5]], [[3], [1], [2]])
    lender, kept = _lenders(held_out, np.array([2, 0, 1]))
    assert lender.tolist() == [2, 0, 1]
    assert [own.tolist() for own in kept] == [[True], [False, True], [True, True]]


def test_a_history_of_which_nothing_would_be_left_is_not_lent() -> None:
    held_out = _held_out([[1, 2], [3], [5]], [[5], [1], [3]])
    lender, kept = _lenders(held_out, np.array([0, 1, 2]))
    assert lender.tolist() == [1, 0, 0]  # 2 has nothing left for 0, and 1 nothing for 2
    assert all(own.any() for own in kept)


@pytest.mark.parametrize("histories", [[[1, 2]], [[1, 2], [3]]])
def test_where_nobody_can_lend_the_history_is_ones_own(histories: list[list[int]]) -> None:
    held_out = _held_out(histories, [[3]] * len(histories))
    lender, kept = _lenders(held_out, np.arange(len(histories)))
    assert lender[0] == 0
    assert kept[0].tolist() == [True, True]
