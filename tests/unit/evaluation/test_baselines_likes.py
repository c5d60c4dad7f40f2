"""Baselines of likes: against hand arithmetic, a general solver, and made-up tastes."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.splits import HeldOut, Split, TrainData
from pfm_llm.evaluation.baselines import likes as module
from pfm_llm.evaluation.baselines.likes import FittedLikes, fit_like_baselines
from pfm_llm.evaluation.metrics import per_user_auc
from tests.support.queries import held_out_of

NUM_ITEMS = 40
Rated = Sequence[tuple[int, bool]]


def held_out(users: Sequence[Rated], name: str = "validation") -> HeldOut:
    """One query a user, whose liked items were rated 4 and the others 3.5."""
    asked = held_out_of([[0]] * len(users), [[item for item, _ in own] for own in users], name)
    ratings = tuple(np.array([4.0 if liked else 3.5 for _, liked in own]) for own in users)
    return dataclasses.replace(asked, target_ratings=ratings)


def split(train: Sequence[Rated], validation: Sequence[Rated], num_items: int) -> Split:
    ids = tuple(f"i{item}" for item in range(num_items))
    rated = [pair for own in train for pair in own]
    interactions = Interactions(
        catalogue=Catalogue(ids, {"title": ids}),
        user_ids=tuple(f"u{user}" for user in range(len(train))),
        offsets=np.cumsum([0, *map(len, train)]),
        items=np.array([item for item, _ in rated], np.int32),
        ratings=np.array([4.0 if liked else 3.5 for _, liked in rated], np.float32),
    )
    asked = held_out(validation)
    return Split(TrainData(interactions), asked, dataclasses.replace(asked, name="test"), "by hand")


def fit(data: Split, features: np.ndarray) -> tuple[FittedLikes, FittedLikes]:
    rate, ridge = fit_like_baselines(data, 4.0, features)
    return rate, ridge


def tastes(num_users: int = 60) -> tuple[np.ndarray, Split, list[Rated]]:
    """Features of items, and users who like the upper half along a direction of their own.

    The third value is all that they rated, the first 25 for training and the others held out.
    """
    random = np.random.default_rng(0)
    features = random.normal(size=(NUM_ITEMS, 3))
    users: list[Rated] = []
    for _ in range(num_users):
        items, direction = random.permutation(NUM_ITEMS), random.normal(size=3)
        users.append([(int(item), bool(features[item] @ direction > 0)) for item in items])
    data = split([own[:25] for own in users], [own[25:] for own in users], NUM_ITEMS)
    return features, data, users


def only(monkeypatch: pytest.MonkeyPatch, damping: float, l2: float = 1.0) -> None:
    monkeypatch.setattr(module, "DAMPINGS", (damping,))
    monkeypatch.setattr(module, "RIDGES", (l2,))


def test_like_rate_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 of 4 ratings are likes. Item 0: 2 likes of 2, item 1: 1 of 2, item 2: none.
    # With damping 2: (2 + 1.5) / 4, (1 + 1.5) / 4, 1.5 / 2.
    only(monkeypatch, 2.0)
    train = [[(0, True), (1, True)], [(1, False), (0, True)]]
    rate, _ = fit(split(train, [[(0, True)], [(1, True)]], 3), np.ones((3, 1)))
    assert rate._rates == pytest.approx([3.5 / 4, 2.5 / 4, 0.75])


def test_like_rate_without_damping_gives_unknown_items_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, 0.0)
    rate, _ = fit(split([[(0, True), (1, False)]], [[(2, True)]], 3), np.ones((3, 1)))
    assert rate._rates.tolist() == [1.0, 0.0, 0.5]


def test_ridge_solves_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a general least-squares solver: one row per item, an intercept, and √l2 · I."""
    l2, damping = 2.5, 3.0
    only(monkeypatch, damping, l2)
    features, data, users = tastes(num_users=9)
    rate, ridge = fit(data, features)
    x = features - features.mean(axis=0)
    x /= np.sqrt((x**2).sum(axis=1).mean())
    labels = np.array([liked for own in users for _, liked in own[:25]])
    for user in (0, 5):
        own = users[user][:25]
        items, liked = np.array([item for item, _ in own]), np.array([like for _, like in own])
        others = [pair for place, one in enumerate(users) if place != user for pair in one[:25]]
        without = [
            (sum(like for i, like in others if i == item) + damping * labels.mean())
            / (sum(i == item for i, _ in others) + damping)
            for item in items
        ]
        design = np.block(
            [[x[items], np.ones((25, 1))], [np.sqrt(l2) * np.eye(3), np.zeros((3, 1))]]
        )
        wanted = np.concatenate([liked - without, np.zeros(3)])
        weights = np.linalg.lstsq(design, wanted, rcond=None)[0][:3]
        asked = held_out([[]] * user + [users[user][25:]]).take([user])
        targets = asked.targets[0]
        expected = per_user_auc([rate._rates[targets] + x[targets] @ weights], asked.liked(4.0))
        assert ridge._weights[user] == pytest.approx(weights, abs=1e-9)
        assert ridge.aucs(asked, asked.liked(4.0)) == pytest.approx(expected)


def test_ridge_finds_tastes_that_the_like_rate_cannot() -> None:
    features, data, _ = tastes()
    rate, ridge = fit(data, features)
    assert (rate.name, ridge.name) == ("like_rate", "like_ridge")
    assert rate.validation_auc < 0.65
    assert ridge.validation_auc > 0.9
    assert ridge.hyperparameters["damping"] == rate.hyperparameters["damping"]
    # Somebody else's weights are no use.
    asked = data.test
    strangers = dataclasses.replace(asked, users=np.roll(asked.users, 1))
    assert np.nanmean(ridge.aucs(strangers, asked.liked(4.0))) < 0.65
    assert np.nanmean(ridge.aucs(asked, asked.liked(4.0))) == ridge.validation_auc


def test_the_best_settings_are_chosen_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    features, data, _ = tastes(num_users=20)
    rate, ridge = fit(data, features)
    dampings, ridges = module.DAMPINGS, module.RIDGES
    values = {}
    for damping in dampings:
        only(monkeypatch, damping)
        values[damping] = fit(data, features)[0].validation_auc
    assert len(set(values.values())) > 1
    assert values[rate.hyperparameters["damping"]] == max(values.values()) == rate.validation_auc
    values = {}
    for l2 in ridges:
        only(monkeypatch, rate.hyperparameters["damping"], l2)
        values[l2] = fit(data, features)[1].validation_auc
    assert len(set(values.values())) > 1
    assert values[ridge.hyperparameters["l2"]] == max(values.values()) == ridge.validation_auc


def test_a_user_without_training_items_gets_the_like_rate() -> None:
    features, _, users = tastes(num_users=4)
    train = [*(own[:25] for own in users), []]
    rate, ridge = fit(split(train, [own[25:] for own in users], NUM_ITEMS), features)
    asked = held_out([*users, users[0]]).take([4])
    assert ridge.aucs(asked, asked.liked(4.0)) == rate.aucs(asked, asked.liked(4.0))


def test_of_an_item_that_comes_twice_the_last_rating_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, 1e9, 1.0)
    others = [(0, True), (1, False), (2, True), (3, False)]
    twice, once = (
        fit(split([others, own], [others, others], 4), np.eye(4))[1]._weights[1]
        for own in ([(0, False), (1, False), (0, True)], [(1, False), (0, True)])
    )
    assert twice == pytest.approx(once, abs=1e-6)
    assert twice.argmax() == 0


def test_constant_features_add_nothing() -> None:
    _, data, _ = tastes(num_users=4)
    _, ridge = fit(data, np.ones((NUM_ITEMS, 2)))
    assert not ridge._weights.any()


def test_without_a_user_who_has_both_classes_the_first_settings_are_kept() -> None:
    rate, ridge = fit(split([[(0, True), (1, False)]], [[(2, True)]], 3), np.eye(3))
    assert math.isnan(rate.validation_auc)
    assert ridge.hyperparameters == {"damping": module.DAMPINGS[0], "l2": module.RIDGES[0]}
