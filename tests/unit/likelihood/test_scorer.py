"""Re-ranking a list."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.likelihood.scorer import rerank

LISTS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=12)


@given(rows=LISTS, weight=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_list_keeps_its_items(rows: list[tuple[int, int]], weight: float) -> None:
    scores, odds = (np.array(values, float) for values in zip(*rows, strict=True))
    scores = -np.sort(-scores)
    items = np.arange(len(rows)) + 7
    found = rerank(items, scores, odds, weight)
    assert sorted(found) == items.tolist()
    places = found - 7
    if weight == 0:
        assert found.tolist() == items.tolist()
    if weight == 1:
        assert (np.diff(odds[places]) <= 0).all()


def test_a_better_answer_never_moves_an_item_down() -> None:
    items, scores = np.array([4, 9, 2]), np.array([3.0, 2.0, 1.0])
    weak, strong = (rerank(items, scores, np.array([0.0, x, 0.0]), 0.5) for x in (0.0, 5.0))
    assert weak.tolist() == [4, 9, 2]
    assert strong.tolist() == [9, 4, 2]


def test_wrong_input_is_refused() -> None:
    one, two = np.array([1]), np.array([1.0, 2.0])
    with pytest.raises(DataError, match="give one each"):
        rerank(one, two, two)
    with pytest.raises(DataError, match="between 0 and 1"):
        rerank(one, one, one, 1.5)
