"""Formulas against hand arithmetic, brute force and ir-measures; intervals over users."""

import math

import evaluate
import ir_measures
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.metrics import (
    RANK_METRICS,
    RankMetric,
    auc,
    bootstrap_interval,
    hit_rate,
    mean_over_users,
    mrr,
    ndcg,
    per_user,
    per_user_auc,
    per_user_choice_log_likelihood,
    per_user_log_likelihood,
)
from pfm_llm.evaluation.scoring import full_ranks

RANKS = np.array([1, 2, 3, 4, 100])


def test_formulas_by_hand_at_k_3():
    assert hit_rate(RANKS, 3).tolist() == [1, 1, 1, 0, 0]
    # 1/log2(2) = 1, 1/log2(3) = 0.6309…, 1/log2(4) = 0.5
    assert ndcg(RANKS, 3).tolist() == pytest.approx([1, 1 / math.log2(3), 0.5, 0, 0])
    assert mrr(RANKS, 3).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 0, 0])


@pytest.mark.parametrize("metric", RANK_METRICS.values())
def test_at_k_1_all_metrics_ask_for_the_first_place(metric):
    values = metric(RANKS, 1)
    assert values.dtype == np.float64
    assert values.tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("metric", RANK_METRICS.values())
def test_rank_metrics_take_no_targets_and_refuse_what_is_no_rank(metric):
    assert metric(np.zeros(0, np.int64), 5).shape == (0,)
    with pytest.raises(DataError, match="rank 0: ranks begin at 1"):
        metric(np.array([1, 0]), 5)
    with pytest.raises(ConfigError, match=r"evaluation\.ks holds 0"):
        metric(RANKS, 0)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 20))
def test_metrics_lie_between_mrr_and_hit_rate_and_grow_with_k(ranks, k):
    ranks = np.array(ranks)
    assert np.all(mrr(ranks, k) <= ndcg(ranks, k))
    assert np.all(ndcg(ranks, k) <= hit_rate(ranks, k))
    for metric in RANK_METRICS.values():
        assert np.all(metric(ranks, k) <= metric(ranks, k + 1))


def test_metrics_equal_brute_force_on_scores_with_ties():
    """Walk down an explicitly sorted list in which the target comes last among its equals."""
    random = np.random.default_rng(3)
    scores = random.integers(0, 20, (60, 30)).astype(np.float32)
    targets = random.integers(0, 30, 60)
    ranks = full_ranks(scores, [np.zeros(0, int)] * 60, [targets[q : q + 1] for q in range(60)])
    for k in (1, 5, 10):
        hits, gains, reciprocals = [], [], []
        for row, target in zip(scores, targets, strict=True):
            ordered = sorted(range(30), key=lambda item: (-row[item], item == target))
            relevance = [float(item == target) for item in ordered[:k]]
            hits.append(sum(relevance))
            gains.append(sum(r / math.log2(place + 2) for place, r in enumerate(relevance)))
            reciprocals.append(sum(r / (place + 1) for place, r in enumerate(relevance)))
        assert 0 < sum(hits) < 60
        assert hit_rate(ranks, k).tolist() == hits
        assert ndcg(ranks, k).tolist() == pytest.approx(gains)
        assert mrr(ranks, k).tolist() == pytest.approx(reciprocals)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_metrics_equal_ir_measures_without_ties(k):
    """Per query, with seen items left out of the run; ties are left to our own tests."""
    random = np.random.default_rng(4)
    scores = np.stack([random.permutation(40) for _ in range(50)]).astype(np.float32)
    items = [random.permutation(40) for _ in range(50)]
    histories, targets = [i[:20] for i in items], [i[20:21] for i in items]
    qrels = [ir_measures.Qrel(str(q), str(t[0]), 1) for q, t in enumerate(targets)]
    run = [
        ir_measures.ScoredDoc(str(query), str(item), float(scores[query, item]))
        for query in range(50)
        for item in items[query][20:]
    ]
    measures = {
        ir_measures.Success @ k: hit_rate,
        ir_measures.nDCG @ k: ndcg,
        ir_measures.RR @ k: mrr,
    }
    ranks = full_ranks(scores, histories, targets)
    compared = 0
    for result in ir_measures.iter_calc(list(measures), qrels, run):
        ours = measures[result.measure](ranks, k)
        assert ours[int(result.query_id)] == pytest.approx(result.value)
        compared += 1
    assert compared == 3 * 50
    assert 0 < hit_rate(ranks, k).mean() < 1


def test_users_count_once_however_many_targets_they_have():
    values, users = per_user(np.array([1.0, 0.0, 0.5, 1.0]), np.array([7, 7, 2, 7]))
    assert users.tolist() == [2, 7]
    assert users.dtype == np.int64
    # User 2: 0.5. User 7: (1 + 0 + 1) / 3. The mean over users, not (2.5 / 4) over targets.
    assert values.tolist() == pytest.approx([0.5, 2 / 3])
    assert mean_over_users(np.array([1.0, 0.0, 0.5, 1.0]), np.array([7, 7, 2, 7])) == (
        pytest.approx((0.5 + 2 / 3) / 2)
    )


def test_per_user_edge_cases():
    values, users = per_user(np.zeros(0), np.zeros(0, np.int64))
    assert values.shape == users.shape == (0,)
    with pytest.raises(DataError, match="nothing to average"):
        mean_over_users(np.zeros(0), np.zeros(0, np.int64))
    with pytest.raises(DataError, match=r"\(2,\) values for \(1,\) users"):
        per_user(np.zeros(2), np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # User 0 has ranks 1 and 11, user 1 has rank 3; k = 10.
        ("hit_rate", ((1 + 0) / 2 + 1) / 2),
        ("ndcg", ((1 + 0) / 2 + 1 / math.log2(4)) / 2),
        ("mrr", ((1 + 0) / 2 + 1 / 3) / 2),
    ],
)
def test_evaluate_metrics_average_within_users_then_over_them(name, expected):
    metric = RankMetric(name, 10)
    for _ in range(2):  # a metric can be computed again
        result = metric.compute(ranks=np.array([1, 3, 11]), groups=np.array([0, 1, 0]))
        assert result == {f"{name}@10": pytest.approx(expected)}


def test_evaluate_metrics_take_batches_and_combine():
    metric = RankMetric("hit_rate", 2)
    metric.add_batch(ranks=[1, 3], groups=[0, 0])
    metric.add_batch(ranks=[2], groups=[1])
    assert metric.compute() == {"hit_rate@2": 0.75}
    both = evaluate.combine([RankMetric("hit_rate", 2), RankMetric("mrr", 2)])
    assert both.compute(ranks=[2], groups=[0]) == {"hit_rate@2": 1.0, "mrr@2": 0.5}


def test_evaluate_metrics_do_not_read_the_global_random_state(monkeypatch):
    """Left alone, `evaluate` takes its seed from there."""

    def refuse():
        raise AssertionError("the global random state was read")

    monkeypatch.setattr(np.random, "get_state", refuse)
    assert RankMetric("ndcg", 5).seed == 0


def test_evaluate_metrics_refuse_bad_input():
    with pytest.raises(ConfigError, match=r"evaluation\.ks holds 0"):
        RankMetric("ndcg", 0)
    with pytest.raises(DataError, match="nothing to average"):
        RankMetric("ndcg", 5).compute(ranks=[], groups=[])


def test_auc_by_hand():
    # Pairs (liked, not): (3, 2) won, (3, 3) tied, (1, 2) lost, (1, 3) lost: 1.5 / 4.
    assert auc(np.array([3.0, 1, 2, 3]), np.array([1, 1, 0, 0])) == 1.5 / 4
    assert auc(np.array([2.0, 1.0]), np.array([True, False])) == 1
    assert auc(np.zeros(5), np.array([1, 0, 0, 1, 0])) == 0.5
    assert math.isnan(auc(np.zeros(2), np.array([1, 1])))
    assert math.isnan(auc(np.zeros(0), np.zeros(0)))
    with pytest.raises(DataError, match="give one each"):
        auc(np.zeros(2), np.zeros(3))


def test_a_score_that_is_not_a_number_loses_every_pair():
    assert auc(np.array([np.nan, 1.0]), np.array([1, 0])) == 0
    assert auc(np.array([1.0, np.nan]), np.array([1, 0])) == 0
    assert auc(np.array([np.nan, np.nan]), np.array([1, 0])) == 0


@given(st.lists(st.tuples(st.sampled_from([-np.inf, 0.0, 0.1, 2.0, np.nan]), st.booleans())))
def test_auc_equals_counting_all_pairs(examples):
    liked = [score for score, label in examples if label]
    others = [score for score, label in examples if not label]
    wins = sum((a > b) + (a == b) / 2 for a in liked for b in others)
    value = auc(np.array([s for s, _ in examples]), np.array([label for _, label in examples]))
    if liked and others:
        assert value == wins / (len(liked) * len(others))
    else:
        assert math.isnan(value)


def test_auc_equals_the_statistic_of_mann_and_whitney_in_scipy_with_many_ties():
    random = np.random.default_rng(6)
    for _ in range(20):
        scores = random.integers(0, 6, 40).astype(np.float32)
        liked = random.random(40) < 0.3
        wins = scipy.stats.mannwhitneyu(scores[liked], scores[~liked]).statistic
        assert auc(scores, liked) == pytest.approx(wins / (liked.sum() * (~liked).sum()))


def test_auc_of_a_user_with_very_many_ratings_needs_no_table_of_pairs():
    """400,000 ratings make 4 * 10^10 pairs. Every liked item ties with one other of 200,000."""
    scores = np.repeat(np.arange(200_000), 2)
    value = auc(scores, np.arange(400_000) % 2 == 0)
    # The i-th liked item is above i others and ties with one: (i + 1/2) / n, on average 1/2.
    assert value == 0.5


def test_auc_per_user_keeps_the_order_and_the_place_of_users_without_one():
    scores = [np.array([2.0, 1.0]), np.array([1.0]), np.zeros(0), np.array([1.0, 1.0, 3.0])]
    liked = [np.array([False, True]), np.array([True]), np.zeros(0, bool), np.array([1, 0, 0]) > 0]
    values = per_user_auc(scores, liked)
    assert values.dtype == np.float64
    # Lost; one class; nothing; one tie (1/2) and one loss of two pairs.
    np.testing.assert_array_equal(values, [0, np.nan, np.nan, 0.25])
    assert per_user_auc([], []).shape == (0,)
    with pytest.raises(DataError, match="scores of 4 users, likes of 3"):
        per_user_auc(scores, liked[:3])
    with pytest.raises(DataError, match="give one each"):
        per_user_auc(scores[:1], liked[1:2])


def test_log_likelihood_is_that_of_the_labels():
    logits = [np.zeros(3), np.array([math.log(3), -math.log(3)]), np.array([-500.0])]
    liked = [np.array([1, 0, 1]) > 0, np.array([True, True]), np.array([True])]
    values = per_user_log_likelihood(logits, liked)
    expected = [-math.log(2), (math.log(0.75) + math.log(0.25)) / 2, -500]
    assert values.tolist() == pytest.approx(expected)
    with pytest.raises(DataError, match="logits of 3 users, likes of 1"):
        per_user_log_likelihood(logits, liked[:1])


def test_choice_log_likelihood_is_that_of_a_softmax_over_what_was_not_met():
    scores = np.log([[1, 2, 3, 4], [1, 1, 1, 1], [9, 1, 1, 1]])
    histories = [np.array([3]), np.array([], int), np.array([0, 0])]
    targets = [np.array([0, 2]), np.array([1]), np.array([], int)]
    values = per_user_choice_log_likelihood(scores, histories, targets)
    assert values[:2].tolist() == pytest.approx([math.log(3 / 36) / 2, -math.log(4)])
    assert math.isnan(values[2])
    with pytest.raises(DataError, match="scores of 3 users, 1 histories"):
        per_user_choice_log_likelihood(scores, histories[:1], targets)


def test_bootstrap_interval_of_equal_values_and_of_one_user_is_a_point():
    assert bootstrap_interval(np.full(20, 0.25), 50, 0.95, 0) == (0.25, 0.25)
    assert bootstrap_interval(np.array([0.7]), 50, 0.95, 0) == (0.7, 0.7)


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    values = (np.arange(1000) % 5 == 0).astype(float)  # mean 0.2, deviation 0.4
    low, high = bootstrap_interval(values, 4000, 0.95, 0)
    # 0.2 ± 1.96 · 0.4 / sqrt(1000) = 0.2 ± 0.0248
    assert low == pytest.approx(0.2 - 0.0248, abs=0.002)
    assert high == pytest.approx(0.2 + 0.0248, abs=0.002)
    narrower = bootstrap_interval(values, 4000, 0.5, 0)
    assert low < narrower[0] < 0.2 < narrower[1] < high


def test_bootstrap_draws_depend_on_the_seed_alone():
    values = np.random.default_rng(0).random(100)
    assert bootstrap_interval(values, 100, 0.9, 1) == bootstrap_interval(values, 100, 0.9, 1)
    assert bootstrap_interval(values, 100, 0.9, 1) != bootstrap_interval(values, 100, 0.9, 2)


def test_bootstrap_does_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(0).random(100)
    at_once = bootstrap_interval(values, 25, 0.9, 0)
    monkeypatch.setattr("pfm_llm.evaluation.metrics._DRAWS_AT_ONCE", 250)  # 2 of 25 resamples
    assert bootstrap_interval(values, 25, 0.9, 0) == at_once
    monkeypatch.setattr("pfm_llm.evaluation.metrics._DRAWS_AT_ONCE", 1)  # always at least 1
    assert bootstrap_interval(values, 25, 0.9, 0) == at_once


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [[0.5]]])
def test_bootstrap_refuses_values_it_cannot_average(values):
    with pytest.raises(DataError, match="one finite value per user"):
        bootstrap_interval(np.array(values), 10, 0.95, 0)


def test_bootstrap_refuses_bad_settings():
    with pytest.raises(ConfigError, match=r"evaluation\.bootstrap is 0"):
        bootstrap_interval(np.ones(3), 0, 0.95, 0)
    for confidence in (0.0, 1.0, np.nan):
        with pytest.raises(ConfigError, match=r"evaluation\.confidence"):
            bootstrap_interval(np.ones(3), 10, confidence, 0)
