"""The rule that gives new items places in a list, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError
from pfm_llm.evaluation.new_places import NewPlaces
from pfm_llm.evaluation.scoring import top_items

SHARES = st.one_of(st.none(), st.floats(0, 1))


@st.composite
def rankings(draw):
    """Scores without ties, seen items, which items are new, and the length of a list."""
    num_items = draw(st.integers(1, 14))
    scores = np.array(draw(st.permutations(range(num_items))), np.float32)
    is_new = np.array(draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items)))
    seen = np.array(draw(st.lists(st.integers(0, num_items - 1), unique=True)), np.int64)
    return scores, seen, is_new, draw(st.integers(1, 8))


def by_hand(scores, seen, is_new, k, share):
    """Put the best new items that are missing in the list at its end, one after another."""
    left = [item for item in np.argsort(-scores, kind="stable").tolist() if item not in seen]
    shown, waiting = left[:k], [item for item in left[k:] if is_new[item]]
    num_new = sum(is_new[item] for item in left)
    wanted = k * num_new // max(1, len(left)) if share is None else int(k * share + 1e-9)
    while waiting and sum(is_new[item] for item in shown) < wanted:
        shown.remove([item for item in shown if not is_new[item]][-1])
        shown.append(waiting.pop(0))
    return shown


@given(rankings(), SHARES)
def test_new_items_take_the_places_of_the_lowest_others(ranking, share):
    scores, seen, is_new, k = ranking
    items, values = NewPlaces(share).top_items(scores, seen, k, is_new)
    assert items.tolist() == by_hand(scores, seen.tolist(), is_new, k, share)
    assert values.tolist() == scores[items].tolist()
    assert values.tolist() == sorted(values.tolist(), reverse=True)


@given(rankings(), SHARES)
def test_the_places_of_targets_are_those_in_the_list(ranking, share):
    scores, seen, is_new, k = ranking
    rule = NewPlaces(share)
    shown = rule.top_items(scores, seen, k, is_new)[0].tolist()
    targets = np.setdiff1d(np.arange(len(scores)), seen)
    above = scores[targets][:, None] < scores[targets]
    full, of_new = 1 + above.sum(1), 1 + (above & is_new[targets]).sum(1)
    plain = np.full(len(targets), is_new[top_items(scores, seen, k)[0]].sum())
    num_new = np.full(len(targets), is_new[targets].sum())
    counts = rule.shown(plain, num_new, np.full(len(targets), len(targets)), k)
    assert counts.tolist() == [is_new[shown].sum()] * len(targets)
    expected = [shown.index(item) + 1 if item in shown else k + 1 for item in targets.tolist()]
    assert rule.ranks(full, of_new, is_new[targets], counts, k).tolist() == expected


@given(rankings())
def test_without_new_items_and_with_a_share_of_zero_the_list_is_the_plain_one(ranking):
    scores, seen, is_new, k = ranking
    plain = top_items(scores, seen, k)[0].tolist()
    none = np.zeros(len(scores), bool)
    assert NewPlaces(1.0).top_items(scores, seen, k, none)[0].tolist() == plain
    assert NewPlaces(0.0).top_items(scores, seen, k, is_new)[0].tolist() == plain
    everything = np.ones(len(scores), bool)
    assert NewPlaces().top_items(scores, seen, k, everything)[0].tolist() == plain


@pytest.mark.parametrize(
    ("share", "num_new", "places"),
    [(None, 9, 0), (None, 10, 1), (None, 19, 1), (0.29, 80, 29), (0.7, 80, 70), (0.5, 3, 3)],
)
def test_the_share_of_places_is_rounded_down(share, num_new, places):
    k = 10 if share is None else 100
    assert NewPlaces(share).count(k, num_new, 100) == places


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=r"new_share: .* give 0 .* to 1"):
        NewPlaces(share)
