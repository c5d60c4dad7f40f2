"""Baselines against hand arithmetic and against their definitions on small random data."""

import logging

import numpy as np
import pytest

from pfm_llm.base.errors import ConfigError, DataError, TrainingError
from pfm_llm.evaluation.baselines import selection
from pfm_llm.evaluation.baselines.ease import MAX_DENSE, Ease
from pfm_llm.evaluation.baselines.ease_markov import EaseMarkov
from pfm_llm.evaluation.baselines.item_knn import ItemKnn
from pfm_llm.evaluation.baselines.markov import MarkovRecency
from pfm_llm.evaluation.baselines.popularity import Popularity
from pfm_llm.evaluation.baselines.selection import BaselineName, fit_baselines
from pfm_llm.evaluation.metrics import ndcg
from pfm_llm.evaluation.scoring import full_ranks
from tests.support.queries import held_out_of

ALL = [Popularity, Ease, MarkovRecency, ItemKnn]


def ids(*items):
    return np.array(items, np.int32)


def random_histories(num_users=30, num_items=12, seed=0):
    random = np.random.default_rng(seed)
    return [
        random.permutation(num_items)[: random.integers(2, 9)].astype(np.int32)
        for _ in range(num_users)
    ]


def test_popularity_counts_training_interactions():
    model = Popularity().fit([ids(0, 2), ids(2), ids()], 4)
    assert model.score([ids(1), ids()]).tolist() == [[1, 0, 2, 0]] * 2


def test_ease_by_hand_on_two_items():
    # X = [[1, 1], [1, 0]], XᵀX + 1·I = [[3, 1], [1, 2]], its inverse [[2, -1], [-1, 3]] / 5.
    # B[0, 1] = -P[0, 1] / P[1, 1] = 1/3 and B[1, 0] = -P[1, 0] / P[0, 0] = 1/2.
    model = Ease(l2=1.0).fit([ids(0, 1), ids(0)], 2)
    assert model.score([ids(0), ids(1), ids(0, 1), ids()]) == pytest.approx(
        np.array([[0, 1 / 3], [1 / 2, 0], [1 / 2, 1 / 3], [0, 0]])
    )


@pytest.mark.parametrize("num_items", [12, 45])
def test_ease_columns_solve_the_ridge_regression_without_the_item_itself(num_items):
    """The definition: column j regresses item j on all other items, ridge l2; 30 users."""
    histories, l2 = random_histories(num_items=num_items), 3.0
    seen = np.zeros((30, num_items))
    for row, history in zip(seen, histories, strict=True):
        row[history] = 1
    weights = Ease(l2).fit(histories, num_items).score([ids(item) for item in range(num_items)])
    for item in range(num_items):
        others = np.delete(seen, item, axis=1)
        gram = others.T @ others + l2 * np.eye(num_items - 1)
        ridge = np.linalg.solve(gram, others.T @ seen[:, item])
        assert np.delete(weights[:, item], item) == pytest.approx(ridge, abs=1e-5)
        assert weights[item, item] == pytest.approx(0, abs=1e-12)


def test_ease_counts_a_repeated_item_once():
    once, twice = Ease().fit([ids(0, 1), ids(1, 2)], 3), Ease().fit([ids(0, 1, 0), ids(1, 2)], 3)
    assert np.array_equal(once.score([ids(0)]), twice.score([ids(0, 0)]))


def test_ease_refuses_a_catalogue_too_large_for_a_dense_matrix():
    with pytest.raises(DataError, match=r"leave ease out of evaluation\.baselines"):
        Ease().fit([ids(0, 1)] * (MAX_DENSE + 1), MAX_DENSE + 1)


def test_markov_by_hand():
    # One history 0 1 2, window 2, distance decay 1/2: count(0, 1) = 1, count(0, 2) = 1/2,
    # count(1, 2) = 1. Popularity 1/3 each, smoothing 3 adds 1 to each cell of a row:
    # P(.|0) = [1, 2, 3/2] / 4.5, P(.|1) = [1, 1, 2] / 4, P(.|2) = [1, 1, 1] / 3.
    model = MarkovRecency(decay=0.5, distance_decay=0.5, window=2, smoothing=3.0)
    model.fit([ids(0, 1, 2)], 3)
    after_0, after_1 = np.array([1, 2, 1.5]) / 4.5, np.array([1, 1, 2]) / 4
    scores = model.score([ids(0), ids(2), ids(), ids(0, 1), ids(1, 0)])
    assert scores == pytest.approx(
        np.array([after_0, [1 / 3] * 3, [1 / 3] * 3, after_1 + after_0 / 2, after_0 + after_1 / 2])
    )


def test_markov_equals_its_definition_on_random_histories():
    histories, decay, distance_decay, smoothing = random_histories(), 0.7, 0.6, 2.5
    popularity = np.bincount(np.concatenate(histories), minlength=12).astype(float)
    popularity /= popularity.sum()
    counts = np.zeros((12, 12))
    for history in histories:
        for place, first in enumerate(history):
            for distance, second in enumerate(history[place + 1 : place + 4]):
                counts[first, second] += distance_decay**distance
    chain = (counts + smoothing * popularity) / (counts.sum(axis=1, keepdims=True) + smoothing)
    assert chain.sum(axis=1) == pytest.approx(np.ones(12))
    expected = [
        sum(decay**age * chain[item] for age, item in enumerate(history[::-1]))
        for history in histories
    ]
    model = MarkovRecency(decay, distance_decay, 3, smoothing).fit(histories, 12)
    assert model.score(histories) == pytest.approx(np.array(expected), rel=1e-5)


def test_markov_never_joins_two_users():
    model = MarkovRecency(smoothing=1e-9).fit([ids(0, 1), ids(2, 3)], 4)
    assert model.score([ids(1)]) == pytest.approx(np.full((1, 4), 0.25))  # popularity alone
    assert model.score([ids(0)])[0].argmax() == 1


def test_markov_takes_a_window_longer_than_all_histories_and_repeats():
    model = MarkovRecency(window=50, smoothing=1e-6).fit([ids(0, 0)], 2)
    assert model.score([ids(0)]) == pytest.approx(np.array([[1, 0]]), abs=1e-5)


def test_item_knn_by_hand():
    # Items 0 and 1 have both users 0 and 1, item 2 has users 0 and 2, item 3 has user 2.
    # s(0, 1) = 2 / (√(2·2) + 1) = 2/3, s(0, 2) = s(1, 2) = 1/3, s(2, 3) = 1 / (√2 + 1).
    histories = [ids(0, 1, 2, 1), ids(0, 1), ids(2, 3)]
    model = ItemKnn(neighbours=9, shrinkage=1.0).fit(histories, 5)
    near = 1 / (2**0.5 + 1)
    assert model.score([ids(0), ids(2), ids(2, 0, 2), ids(4)]) == pytest.approx(
        np.array(
            [
                [0, 2 / 3, 1 / 3, 0, 0],
                [1 / 3, 1 / 3, 0, near, 0],
                [1 / 3, 1, 1 / 3, near, 0],
                [0, 0, 0, 0, 0],
            ]
        )
    )
    # With one neighbour each, 0 and 1 have only each other, and 2 and 3 too.
    one = ItemKnn(neighbours=1, shrinkage=1.0).fit(histories, 5)
    assert one.score([ids(2)]) == pytest.approx(np.array([[0, 0, 0, near, 0]]))


def test_item_knn_counts_the_neighbours_of_the_candidate():
    # Item 1 is nearest to 0, but the only one that item 2 is near to is 1.
    histories = [ids(0, 1), ids(0, 1), ids(1, 2)]
    scores = ItemKnn(neighbours=1, shrinkage=0.0).fit(histories, 3).score([ids(1)])
    assert scores == pytest.approx(np.array([[2 / 6**0.5, 0, 1 / 3**0.5]]))


def test_item_knn_does_not_break_ties_by_the_order_of_ids():
    # Items 1, 2, 3 are equally near to item 0, which has room for one neighbour.
    model = ItemKnn(neighbours=1, shrinkage=0.0).fit([ids(0, 1), ids(0, 2), ids(0, 3)], 4)
    scores = model.score([ids(1), ids(2), ids(3)])[:, 0]
    assert scores == pytest.approx(np.full(3, 3**-0.5))


def test_ease_markov_adds_scores_of_one_scale():
    train = random_histories()
    ease, markov = Ease().fit(train, 12), MarkovRecency().fit(train, 12)
    queries = [*random_histories(seed=1), ids(3)]

    def standard(scores):
        centred = scores - scores.mean(axis=1, keepdims=True)
        return centred / centred.std(axis=1, keepdims=True)

    expected = 0.3 * standard(ease.score(queries)) + 0.7 * standard(markov.score(queries))
    mixed = EaseMarkov(ease, markov, 0.3).score(queries)
    assert mixed.dtype == np.float32
    assert mixed == pytest.approx(expected, abs=1e-5)


def test_ease_markov_of_an_empty_history_is_markov_alone():
    train = random_histories()
    markov = MarkovRecency().fit(train, 12)
    mixed = EaseMarkov(Ease().fit(train, 12), markov, 0.9).score([ids()])
    assert np.isfinite(mixed).all()
    assert (mixed[0].argsort() == markov.score([ids()])[0].argsort()).all()


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_of_0_to_1_is_refused(weight):
    with pytest.raises(ConfigError, match="weight of EASE"):
        EaseMarkov(Ease(), MarkovRecency(), weight)


@pytest.mark.parametrize("method", ALL)
def test_scores_are_float32_and_do_not_depend_on_the_other_queries(method):
    histories = [*random_histories(), ids()]
    model = method().fit(histories, 12)
    together = model.score(histories)
    assert together.shape == (31, 12)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    apart = np.concatenate([model.score([history]) for history in histories])
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-7)
    assert model.score([]).shape == (0, 12)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("histories", [[], [ids()], [ids(0)]])
def test_tiny_training_sets_score_finitely(method, histories):
    for num_items in (1, 3):
        scores = method().fit(histories, num_items).score([ids(0), ids()])
        assert scores.shape == (2, num_items)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("method", ALL)
def test_what_does_not_fit_is_refused(method):
    with pytest.raises(DataError, match="history item 3 is outside the catalogue of 3"):
        method().fit([ids(0, 3)], 3)
    with pytest.raises(DataError, match="history item -1 is outside"):
        method().fit([ids(-1)], 3)
    with pytest.raises(DataError, match="no items"):
        method().fit([], 0)
    with pytest.raises(TrainingError, match=r"score\(\) before fit\(\)"):
        method().score([ids(0)])


@pytest.mark.parametrize("method", [Ease, MarkovRecency, ItemKnn])
def test_scored_histories_must_be_of_the_fitted_catalogue(method):
    with pytest.raises(DataError, match="history item 5 is outside"):
        method().fit([ids(0, 1)], 3).score([ids(5)])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (Ease, {"l2": 0.0}),
        (Ease, {"l2": float("nan")}),
        (MarkovRecency, {"decay": 0.0}),
        (MarkovRecency, {"decay": 1.1}),
        (MarkovRecency, {"distance_decay": 0.0}),
        (MarkovRecency, {"window": 0}),
        (MarkovRecency, {"smoothing": 0.0}),
        (ItemKnn, {"neighbours": 0}),
        (ItemKnn, {"shrinkage": -1.0}),
        (ItemKnn, {"shrinkage": float("nan")}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(method, settings):
    with pytest.raises(ConfigError):
        method(**settings)


def split_of(histories):
    train = [history[:-1] for history in histories]
    return train, held_out_of(train, [history[-1:] for history in histories])


def test_each_baseline_is_fitted_on_train_with_its_best_validation_setting():
    train, validation = split_of(random_histories(num_users=60))
    fitted = fit_baselines(["markov_recency", "popularity", "ease"], train, 12, validation)
    assert [f.name for f in fitted] == ["markov_recency", "popularity", "ease"]
    methods = {"markov_recency": MarkovRecency, "popularity": Popularity, "ease": Ease}
    for baseline in fitted:
        again = methods[baseline.name](**baseline.hyperparameters).fit(train, 12)
        scores = baseline.score(validation.histories)
        assert np.array_equal(scores, again.score(validation.histories))
        ranks = full_ranks(scores, validation.histories, validation.targets)
        assert baseline.validation_ndcg == pytest.approx(ndcg(ranks, 10).mean())
    # No l2 of a wide grid around the chosen one does better than what was chosen.
    ease = fitted[2]
    for l2 in (50.0, 100.0, 200.0, 500.0, 1000.0):
        scores = Ease(l2).fit(train, 12).score(validation.histories)
        ranks = full_ranks(scores, validation.histories, validation.targets)
        assert ndcg(ranks, 10).mean() <= ease.validation_ndcg


def test_the_choice_follows_validation():
    """Two validation sets, each made of what one l2 ranks first, choose different settings."""
    random = np.random.default_rng(0)
    popular = random.dirichlet(np.full(30, 0.5), 300)
    train = [random.choice(30, 8, replace=False, p=(p + 1e-3) / (p + 1e-3).sum()) for p in popular]
    chosen = []
    for l2 in (50.0, 1000.0):
        scores = Ease(l2).fit(train, 30).score(train)
        np.put_along_axis(scores, np.stack(train), -np.inf, axis=1)
        targets = [row.argmax(keepdims=True) for row in scores]
        [ease] = fit_baselines(["ease"], train, 30, held_out_of(train, targets))
        assert ease.validation_ndcg == 1.0
        chosen.append(ease.hyperparameters["l2"])
    assert chosen == [50.0, 1000.0]


def test_the_mixture_stands_on_what_was_chosen_alone(monkeypatch):
    """Its parts are the chosen ones, fitted once; its weight is the best of the grid."""
    fits = []
    fit_ease = Ease.fit
    monkeypatch.setattr(Ease, "fit", lambda self, *args: fits.append(self) or fit_ease(self, *args))
    train, validation = split_of(random_histories(num_users=60, seed=3))
    mixed, ease, markov = fit_baselines(
        ["ease_markov", "ease", "markov_recency"], train, 12, validation
    )
    assert len(fits) == 5  # the grid of EASE, once
    assert mixed.hyperparameters == {
        "weight": mixed.hyperparameters["weight"],
        "ease_l2": ease.hyperparameters["l2"],
        **{f"markov_{name}": value for name, value in markov.hyperparameters.items()},
    }

    def value_of(weight):
        scores = EaseMarkov(ease, markov, weight).score(validation.histories)
        ranks = full_ranks(scores, validation.histories, validation.targets)
        return ndcg(ranks, 10).mean()

    values = {weight: value_of(weight) for weight in selection.EASE_WEIGHTS}
    assert mixed.validation_ndcg == pytest.approx(max(values.values()))
    assert values[mixed.hyperparameters["weight"]] == max(values.values())
    assert values[selection.EASE_WEIGHTS[0]] < max(values.values())
    assert np.array_equal(
        mixed.score(validation.histories),
        EaseMarkov(ease, markov, mixed.hyperparameters["weight"]).score(validation.histories),
    )


def test_validation_in_several_batches_counts_each_user_once():
    """600 queries, more than one batch; user 0 has two targets that average to one value."""
    train = [ids(0)] * 600
    targets = [ids(1, 2)] + [ids(1)] * 599
    [popularity] = fit_baselines(
        ["popularity"], [*train, ids(1, 1), ids(2)], 3, held_out_of(train, targets)
    )
    # Item 1 ranks first (gain 1), item 2 second (1 / log2 3 = 0.6309…).
    expected = ((1 + 1 / np.log2(3)) / 2 + 599) / 600
    assert popularity.validation_ndcg == pytest.approx(expected, abs=1e-12)


def test_an_unknown_baseline_is_refused_with_the_nearest_name():
    train, validation = split_of(random_histories())
    with pytest.raises(
        ConfigError, match="unknown baseline 'markov_rec'; did you mean markov_recency"
    ):
        fit_baselines(["popularity", "markov_rec"], train, 12, validation)
    with pytest.raises(
        ConfigError, match="valid: popularity, ease, markov_recency, item_knn, ease_m"
    ):
        fit_baselines(["zzz"], train, 12, validation)
    assert fit_baselines([], train, 12, validation) == []


def test_an_empty_validation_set_is_refused():
    with pytest.raises(DataError, match="nothing to average"):
        fit_baselines(["ease"], [ids(0, 1)], 2, held_out_of([], []))


def test_every_name_can_be_fitted():
    train, validation = split_of(random_histories())
    fitted = fit_baselines([name.value for name in BaselineName], train, 12, validation)
    assert len(fitted) == len(BaselineName) == 5


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["popularity"], 1),
        (["ease_markov", "popularity"], 1 + 5 + 12 + 1),  # a mixture fits its two parts
        (["ease", "ease_markov", "markov_recency"], 5 + 12 + 1),  # once
    ],
)
def test_fits_are_counted(names: list[str], count: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train = [np.array([user % 6, (user + 1) % 6]) for user in range(12)]
    targets = [np.array([(user + 2) % 6]) for user in range(12)]
    fit_baselines(names, train, 6, held_out_of(train, targets))
    assert f"fitting baselines: {count}/{count}" in caplog.text
