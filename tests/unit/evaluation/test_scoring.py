"""Ranks against brute force, with ties, NaN, masks and padding; recommended items."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation import scoring
from pfm_llm.evaluation.scoring import full_ranks, queries_at_once, sampled_ranks, top_items


def ids(*items):
    return np.array(items, np.int32)


@st.composite
def queries(draw):
    """Scores from few values (so ties and NaN abound), seen items, and unseen targets."""
    num_queries, num_items = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf, np.nan])
    cells = draw(st.lists(values, min_size=num_queries * num_items, max_size=100))
    scores = np.array(cells[: num_queries * num_items], np.float32)
    histories, targets = [], []
    for _ in range(num_queries):
        items = draw(st.permutations(range(num_items)))
        num_targets = draw(st.integers(0, num_items))
        seen = items[num_targets:]
        targets.append(ids(*items[:num_targets]))
        histories.append(ids(*(draw(st.lists(st.sampled_from(seen))) if seen else ())))
    return scores.reshape(num_queries, num_items), histories, targets


def rank_by_sorting(row, candidates, target):
    """Sort from best to worst with the target last among its equals, and look it up.

    NaN takes the place that hurts: the bottom for the target, the top for the others.
    """

    def key(item):
        if item == target:
            return (np.isnan(row[item]), 0.0 if np.isnan(row[item]) else -row[item], 1)
        return (False, -np.inf if np.isnan(row[item]) else -row[item], 0)

    return 1 + sorted(candidates, key=key).index(target)


@given(queries())
def test_full_ranks_equal_explicit_sorting(query):
    scores, histories, targets = query
    expected = [
        rank_by_sorting(row, set(range(len(row))) - set(seen.tolist()), target)
        for row, seen, wanted in zip(scores, histories, targets, strict=True)
        for target in wanted.tolist()
    ]
    ranks = full_ranks(scores, histories, targets)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == expected


@given(queries(), st.integers(0, 2**32 - 1))
def test_sampled_ranks_equal_explicit_sorting(query, seed):
    scores, _, targets = query
    random = np.random.default_rng(seed)
    rows, expected = [], []
    for row, wanted in zip(scores, targets, strict=True):
        for target in wanted.tolist():
            others = np.setdiff1d(np.arange(len(row)), [target])
            drawn = random.permutation(others)[: random.integers(len(others) + 1)]
            rows.append(np.pad(drawn, (0, 9 - len(drawn)), constant_values=-1))
            expected.append(rank_by_sorting(row, {target, *drawn.tolist()}, target))
    negatives = np.array(rows, np.int32).reshape(-1, 9)
    ranks = sampled_ranks(scores, targets, negatives)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == expected


def test_seen_items_are_no_candidates_and_other_targets_are():
    scores = np.array([[9, 8, 7, 6, 5]], np.float32)
    # Item 0 is seen (twice). Target 4 has 1, 2, 3 above it, of which 2 is a target itself.
    assert full_ranks(scores, [ids(0, 0)], [ids(4, 2)]).tolist() == [4, 2]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_constant_scorer_ranks_the_target_last(value):
    scores = np.full((1, 10), value, np.float32)
    assert full_ranks(scores, [ids(7, 8, 9)], [ids(0)]).tolist() == [7]
    assert sampled_ranks(scores, [ids(0)], np.array([[1, 2, -1]])).tolist() == [3]


def test_a_single_item_ranks_first():
    scores = np.zeros((1, 1), np.float32)
    assert full_ranks(scores, [ids()], [ids(0)]).tolist() == [1]
    assert sampled_ranks(scores, [ids(0)], np.array([[-1, -1]])).tolist() == [1]
    assert sampled_ranks(scores, [ids(0)], np.zeros((1, 0), np.int32)).tolist() == [1]


def test_no_queries_give_no_ranks():
    assert full_ranks(np.zeros((0, 5), np.float32), [], []).shape == (0,)
    assert sampled_ranks(np.zeros((0, 5)), [], np.zeros((0, 9), np.int32)).shape == (0,)


def test_padding_does_not_read_the_last_item():
    # -1 would index item 2, which beats the target.
    scores = np.array([[1, 0, 5]], np.float32)
    assert sampled_ranks(scores, [ids(0)], np.array([[1, -1]])).tolist() == [1]


def test_many_targets_are_ranked_in_their_own_rows():
    """Each of 5,000 targets has a row of scores of its own."""
    num_queries = 5000
    scores = np.zeros((num_queries, 3), np.float32)
    scores[np.arange(num_queries), np.arange(num_queries) % 3] = 1  # one item above the others
    targets = [ids(0)] * num_queries
    negatives = np.tile(ids(1, 2), (num_queries, 1))
    # The best item is the target in every third query; else all others are at or above it.
    expected = np.where(np.arange(num_queries) % 3 == 0, 1, 3)
    assert np.array_equal(sampled_ranks(scores, targets, negatives), expected)
    assert np.array_equal(full_ranks(scores, [ids()] * num_queries, targets), expected)


def test_targets_are_compared_in_bounded_blocks_with_the_same_ranks(monkeypatch):
    """Blocks of two targets, of one, and of all of them."""
    random = np.random.default_rng(1)
    scores = random.integers(0, 5, (3, 12)).astype(np.float32)
    targets = [ids(0, 1, 2, 3, 4), ids(5), ids()]
    negatives = random.integers(6, 12, (6, 4))
    whole = full_ranks(scores, [ids(11)] * 3, targets), sampled_ranks(scores, targets, negatives)
    for limit in (24, 1):
        monkeypatch.setattr(scoring, "_COMPARED_AT_ONCE", limit)
        assert np.array_equal(full_ranks(scores, [ids(11)] * 3, targets), whole[0])
        assert np.array_equal(sampled_ranks(scores, targets, negatives), whole[1])
    monkeypatch.setattr(scoring, "_COMPARED_AT_ONCE", 24)
    assert [len(range(6)[some]) for some in scoring._blocks(6, 12)] == [2, 2, 2]
    assert [len(range(6)[some]) for some in scoring._blocks(6, 100)] == [1] * 6


def test_fewer_queries_are_scored_at_once_on_a_large_catalogue():
    """2^26 scores: 1,024 queries of up to 65,536 items, 64 of 2^20, and never none."""
    cases = {0: 1024, 1682: 1024, 65_536: 1024, 65_537: 1023, 1 << 20: 64, 1 << 30: 1}
    assert {size: queries_at_once(size, 1024) for size in cases} == cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_torch_scores_rank_as_numpy_scores(dtype):
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores.requires_grad_()
    targets, histories = [ids(3, 4)] * 4, [ids(0, 1)] * 4
    negatives = np.tile(ids(5, 6, 7), (8, 1))
    same = scores.detach().double().numpy()
    expected = full_ranks(same, histories, targets)
    assert len(set(expected.tolist())) > 2
    assert np.array_equal(full_ranks(scores, histories, targets), expected)
    assert np.array_equal(
        sampled_ranks(scores, targets, negatives), sampled_ranks(same, targets, negatives)
    )


@pytest.mark.parametrize(
    ("histories", "targets", "message"),
    [
        ([ids(1), ids(1)], [ids(0)], "2 histories for 1 queries"),
        ([ids(1)], [ids(0), ids(0)], r"scores have shape \(1, 3\), expected \[2 queries"),
        ([ids(1)], [ids(3)], "target item 3 is outside the catalogue of 3 items"),
        ([ids(1)], [ids(-1)], "target item -1 is outside"),
        ([ids(1, 5)], [ids(0)], "history item 5 is outside"),
        ([ids(-1)], [ids(0)], "history item -1 is outside"),
        ([ids(1, 2)], [ids(0, 2)], "query 0: target item 2 is in its own history"),
    ],
)
def test_full_ranks_refuses_what_does_not_fit(histories, targets, message):
    with pytest.raises(DataError, match=message):
        full_ranks(np.zeros((1, 3), np.float32), histories, targets)


@pytest.mark.parametrize(
    ("targets", "negatives", "message"),
    [
        ([ids(0, 1)], [[2]], r"shape \(1, 1\), expected one row for each of the 2 targets"),
        ([ids(0)], [2], "expected one row"),
        ([ids(0)], [[3]], "negative item 3 is outside"),
        ([ids(0)], [[-2]], "negative item -2 is outside"),
        ([ids(3)], [[0]], "target item 3 is outside"),
        ([ids(1)], [[0, 1]], "among its own negatives"),
    ],
)
def test_sampled_ranks_refuses_what_does_not_fit(targets, negatives, message):
    with pytest.raises(DataError, match=message):
        sampled_ranks(np.zeros((1, 3), np.float32), targets, np.array(negatives))


def test_top_items_are_unseen_best_first_and_ties_go_to_the_lower_id():
    scores = np.array([1, 3, 2, 3, np.nan, 2, -np.inf], np.float32)
    items, values = top_items(scores, ids(0), 4)
    assert items.tolist() == [1, 3, 2, 5]
    assert values.tolist() == [3, 3, 2, 2]
    # Enough equal scores that a sort which is not stable would mix them.
    assert top_items(np.tile([1, 2], 500).astype(np.float32), ids(), 500)[0].tolist() == [
        *range(1, 1000, 2)
    ]


def test_top_items_stop_where_the_catalogue_ends():
    scores = torch.tensor([1.0, float("nan"), 2.0])
    assert top_items(scores, ids(), 10)[0].tolist() == [2, 0]
    assert top_items(scores, ids(0, 2), 10)[0].tolist() == []
    assert top_items(scores, ids(), 0)[0].tolist() == []


@given(queries())
def test_top_items_agree_with_full_ranks(query):
    """With the ties broken, the item recommended at place p has rank p."""
    scores, histories, _ = query
    row = np.random.default_rng(0).permutation(scores.shape[1]).astype(np.float32)
    items, _ = top_items(row, histories[0], len(row))
    assert set(items.tolist()) == set(range(len(row))) - set(histories[0].tolist())
    ranks = full_ranks(row[None, :], histories[:1], [items])
    assert ranks.tolist() == list(range(1, len(items) + 1))


def test_top_items_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="cannot recommend -1 items"):
        top_items(np.zeros(3), ids(), -1)
    with pytest.raises(DataError, match="history item 3 is outside"):
        top_items(np.zeros(3), ids(3), 1)
