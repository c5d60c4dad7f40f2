"""The references for likes: against hand arithmetic, a general solver, and made-up tastes."""

import numpy as np
import pytest

from pfm_llm.base.errors import ConfigError, DataError, TrainingError
from pfm_llm.evaluation.baselines import (
    ItemLikeRate,
    LikeQueries,
    LikeRidge,
    choose_item_like_rate,
    choose_like_ridge,
)
from pfm_llm.evaluation.baselines.likes import DAMPINGS, mean_user_auc

NUM_ITEMS = 40


def ids(*items):
    return np.array(items, np.int32)


def likes(*values):
    return np.array(values, bool)


def tastes(num_users=60, seed=0):
    """Features of items, and users who like the upper half along a direction of their own."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(NUM_ITEMS, 3))
    items = [random.permutation(NUM_ITEMS) for _ in range(num_users)]
    liked = [features[own] @ random.normal(size=3) > 0 for own in items]
    train = [own[:25] for own in items], [own[:25] for own in liked]
    held_out = LikeQueries(
        np.arange(num_users), tuple(own[25:] for own in items), tuple(own[25:] for own in liked)
    )
    return features, *train, held_out


def test_like_rate_by_hand():
    # 3 of 4 ratings are likes. Item 0: 2 likes of 2, item 1: 1 of 2, item 2: none.
    # With damping 2: (2 + 1.5) / 4, (1 + 1.5) / 4, 1.5 / 2.
    model = ItemLikeRate(2.0).fit([ids(0, 1), ids(1, 0)], [likes(1, 1), likes(0, 1)], 3)
    scores = model.score(np.array([1, 0]))
    assert scores.dtype == np.float32
    assert scores == pytest.approx(np.array([[3.5 / 4, 2.5 / 4, 0.75]] * 2))


def test_like_rate_without_damping_gives_unknown_items_the_mean():
    model = ItemLikeRate(0.0).fit([ids(0)], [likes(1)], 2)
    assert model.score(np.array([0])).tolist() == [[1.0, 1.0]]
    assert model.without_own(ids(0), likes(1)).tolist() == [1.0]
    assert ItemLikeRate(0.0).fit([], [], 2).score(np.array([], int)).shape == (0, 2)


def test_rates_without_ones_own_ratings_are_those_of_the_others():
    _, histories, liked, _ = tastes(num_users=8)
    model = ItemLikeRate(0.0).fit(histories, liked, NUM_ITEMS)
    others = ItemLikeRate(0.0).fit(histories[1:], liked[1:], NUM_ITEMS).score(np.array([0]))[0]
    rated = np.isin(histories[0], np.concatenate(histories[1:]))
    assert rated.any()
    own = model.without_own(histories[0], liked[0])
    assert own[rated] == pytest.approx(others[histories[0]][rated])


def test_ridge_solves_its_definition():
    """Against a general least-squares solver: one row per item, an intercept, and √l2 · I."""
    features, histories, liked, _ = tastes(num_users=9)
    l2, damping = 2.5, 3.0
    model = LikeRidge(features, l2, damping).fit(histories, liked, NUM_ITEMS)
    x = features - features.mean(axis=0)
    x /= np.sqrt((x**2).sum(axis=1).mean())
    rate = ItemLikeRate(damping).fit(histories, liked, NUM_ITEMS)
    for user in (0, 5):
        items, labels = histories[user], liked[user]
        design = np.block(
            [[x[items], np.ones((25, 1))], [np.sqrt(l2) * np.eye(3), np.zeros((3, 1))]]
        )
        wanted = np.concatenate([labels - rate.without_own(items, labels), np.zeros(3)])
        weights = np.linalg.lstsq(design, wanted, rcond=None)[0][:3]
        expected = rate.score(np.array([user]))[0] + x @ weights
        assert model.score(np.array([user]))[0] == pytest.approx(expected, abs=1e-5)


def test_ridge_finds_tastes_that_the_like_rate_cannot():
    features, histories, liked, held_out = tastes()
    rate = choose_item_like_rate(histories, liked, NUM_ITEMS, held_out)
    ridge = choose_like_ridge(histories, liked, features, held_out)
    assert rate.validation_auc < 0.65
    assert ridge.validation_auc > 0.9
    assert ridge.hyperparameters["damping"] == rate.hyperparameters["damping"]
    # Somebody else's weights are no use.
    strangers = LikeQueries(np.roll(held_out.users, 1), held_out.targets, held_out.liked)
    assert mean_user_auc(ridge, strangers) < 0.65


def test_the_best_damping_is_chosen_on_validation():
    _, histories, liked, held_out = tastes()
    chosen = choose_item_like_rate(histories, liked, NUM_ITEMS, held_out)
    values = {
        damping: mean_user_auc(ItemLikeRate(damping).fit(histories, liked, NUM_ITEMS), held_out)
        for damping in DAMPINGS
    }
    assert chosen.validation_auc == max(values.values())
    assert values[chosen.hyperparameters["damping"]] == chosen.validation_auc


def test_a_user_without_training_items_gets_the_like_rate():
    features, histories, liked, _ = tastes(num_users=4)
    histories, liked = [*histories, ids()], [*liked, likes()]
    model = LikeRidge(features).fit(histories, liked, NUM_ITEMS)
    rate = ItemLikeRate(5.0).fit(histories, liked, NUM_ITEMS)
    last = np.array([4])
    assert np.array_equal(model.score(last), rate.score(last))


def test_of_an_item_that_comes_twice_the_last_rating_counts():
    features = np.eye(4)
    others, theirs = [ids(0, 1, 2, 3)], [likes(1, 0, 1, 0)]
    fits = [
        LikeRidge(features, 1.0, 1e9).fit([*others, own], [*theirs, labels], 4)
        for own, labels in ((ids(0, 1, 0), likes(0, 0, 1)), (ids(1, 0), likes(0, 1)))
    ]
    scores = [model.score(np.array([1]))[0] for model in fits]
    assert scores[0].argmax() == 0
    assert np.ptp(scores[0] - scores[1]) < 1e-6  # equal but for the mean, which counts all


def test_the_mean_is_over_users_with_both_kinds_of_items():
    model = ItemLikeRate(0.0).fit([ids(0, 1, 0)], [likes(1, 0, 1)], 3)
    # User 0 is ordered right (1), user 1 wrong (0), user 2 has likes alone and does not count.
    queries = LikeQueries(
        np.array([0, 0, 0]),
        (ids(0, 1), ids(0, 1), ids(0, 1)),
        (likes(1, 0), likes(0, 1), likes(1, 1)),
    )
    assert mean_user_auc(model, queries) == 0.5
    with pytest.raises(DataError, match="no user has both"):
        mean_user_auc(model, LikeQueries(np.array([0]), (ids(0),), (likes(1),)))


def test_constant_features_add_nothing():
    _, histories, liked, _ = tastes(num_users=4)
    model = LikeRidge(np.ones((NUM_ITEMS, 2))).fit(histories, liked, NUM_ITEMS)
    rate = ItemLikeRate(5.0).fit(histories, liked, NUM_ITEMS)
    assert np.array_equal(model.score(np.arange(4)), rate.score(np.arange(4)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="damping is -1"):
        ItemLikeRate(-1.0)
    with pytest.raises(ConfigError, match="l2 is 0"):
        LikeRidge(np.ones((2, 2)), l2=0.0)
    with pytest.raises(DataError, match="finite matrix"):
        LikeRidge(np.array([[np.nan]]))
    with pytest.raises(DataError, match="finite matrix"):
        LikeRidge(np.ones(3))
    with pytest.raises(DataError, match="differ in length"):
        ItemLikeRate().fit([ids(0, 1)], [likes(1)], 2)
    with pytest.raises(DataError, match="history item 2 is outside"):
        ItemLikeRate().fit([ids(2)], [likes(1)], 2)
    with pytest.raises(DataError, match="2 rows for 3 items"):
        LikeRidge(np.ones((2, 2))).fit([ids(0)], [likes(1)], 3)
    for model in (ItemLikeRate(), LikeRidge(np.ones((2, 2)))):
        with pytest.raises(TrainingError, match=r"score\(\) before fit\(\)"):
            model.score(np.array([0]))
