"""SASRec: its windows and its loss by hand, causality, a pattern it must learn, and its choices."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from benchmarks.baselines import measuring, sasrec_training
from benchmarks.baselines.sasrec_model import NO_TARGET, SasRec, Settings, cut, pad
from benchmarks.baselines.sasrec_training import train, train_epochs
from pfm_llm.base.errors import DataError, TrainingError
from pfm_llm.evaluation.metrics import ndcg
from tests.support.trained_baselines import NUM_ITEMS, circles, without_test, world

SMALL = Settings(dim=16, window=4, batch=8, epochs=3, dropout=0.0, lr=1e-2)


def model_of(seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SasRec(NUM_ITEMS, dataclasses.replace(SMALL, **changes)).eval()


def epochs_of(histories, settings, seed):
    return train_epochs(histories, functools.partial(SasRec, NUM_ITEMS, settings), settings, seed)


def pairs(history, window):
    return [(items.tolist(), targets.tolist()) for items, targets in cut(np.array(history), window)]


def test_windows_are_cut_from_the_newest_end():
    assert pairs([1, 2, 3, 4, 5, 6], 2) == [([4, 5], [5, 6]), ([2, 3], [3, 4]), ([1], [2])]
    assert pairs([1, 2, 3], 2) == [([1, 2], [2, 3])]
    assert pairs([1, 2], 100) == [([1], [2])]
    assert pairs([1], 2) == pairs([], 2) == []


def test_padding_comes_last():
    assert pad([np.array([3, 4]), np.array([5])], -1).tolist() == [[3, 4], [5, -1]]


def test_a_state_sees_nothing_later():
    model = model_of()
    items = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 8]])
    states = model(items)
    assert torch.allclose(states[0, :2], states[1, :2], atol=1e-6)
    assert not torch.allclose(states[0, 2], states[1, 2], atol=1e-3)
    assert torch.allclose(model(items[:, :2]), states[:, :2], atol=1e-6)  # so padding is harmless


def test_a_state_sees_the_order_of_what_came_before():
    # In one layer, only the positions tell it.
    states = model_of(num_layers=1)(torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert not torch.allclose(states[0, 2], states[1, 2], atol=1e-3)


def test_the_loss_is_the_cross_entropy_over_the_catalogue():
    model = model_of()
    items, targets = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.full((2, 3), NO_TARGET)
    targets[0, 1], targets[1, 0] = 7, 5
    states = model(items)
    expected = [
        torch.logsumexp(model.items.weight @ state, 0) - model.items.weight[target] @ state
        for state, target in ((states[0, 1], 7), (states[1, 0], 5))
    ]
    assert model.loss(items, targets).item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)


def test_scores_are_inner_products_with_the_state_after_the_newest_window():
    model = model_of()
    long, short = np.array([9, 8, 1, 2, 3, 4], np.int32), np.array([5], np.int32)
    scores = model.score([long, short, long[-4:]])
    assert scores.dtype == np.float32
    state = model(torch.tensor([[1, 2, 3, 4]]))[0, -1]
    assert scores[0] == pytest.approx((model.items.weight @ state).detach().numpy(), abs=1e-5)
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    assert scores[1] == pytest.approx(model.score([short])[0], abs=1e-6)
    assert model.score([]).shape == (0, NUM_ITEMS)
    with pytest.raises(DataError, match="empty history"):
        model.score([np.array([], int)])


def test_scoring_many_queries_in_batches(monkeypatch):
    model = model_of()
    histories = [np.arange(1 + n % 6) for n in range(7)]
    together = model.score(histories)
    monkeypatch.setattr("benchmarks.baselines.sasrec_model._QUERIES_AT_ONCE", 3)
    assert model.score(histories) == pytest.approx(together, abs=1e-6)


def test_scoring_turns_dropout_off():
    model = model_of(dropout=0.9).train()
    assert np.array_equal(model.score([np.array([1])]), model.score([np.array([1])]))


def test_training_drops_out_after_scoring_too():
    histories = [np.arange(5)] * 4
    still = dataclasses.replace(SMALL, lr=1e-12)
    for dropout, num_losses in ((0.0, 1), (0.5, 3)):
        settings = dataclasses.replace(still, dropout=dropout)
        losses = []
        for model, loss in epochs_of(histories, settings, 0):
            model.score(histories)
            losses.append(round(loss, 5))
        assert len(set(losses)) == num_losses


def test_it_learns_what_comes_next(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles())
    trained = train(config, split, [dataclasses.replace(SMALL, epochs=25)])
    for held_out in (split.validation, split.test):
        ranks = measuring.rank(
            trained.score, held_out, measuring.negatives_of(held_out, split, config)
        )
        assert ndcg(ranks.full, 10).mean() > 0.9


def test_epochs_depend_on_the_seed_alone():
    histories = [np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8])] * 3
    settings = dataclasses.replace(SMALL, dropout=0.5, batch=2)

    def scores(seed, disturb=False):
        before = torch.get_rng_state()
        for model, _ in epochs_of(histories, settings, seed):
            newest = model
            if disturb:
                torch.rand(3)
        assert disturb or torch.equal(torch.get_rng_state(), before)
        return newest.score([np.array([1, 2])])

    assert np.array_equal(scores(0), scores(0, disturb=True))
    assert not np.array_equal(scores(0), scores(1))


def test_the_test_split_is_never_read_and_validation_is_not_trained_on(tiny, tmp_path):
    config, split = world(tiny, tmp_path / "a", circles())
    trained = train(config, without_test(split), [SMALL])
    other = {
        user: [*items[:-2], (items[-3] + 11) % NUM_ITEMS, (items[-3] + 12) % NUM_ITEMS]
        for user, items in circles().items()
    }
    _, other_split = world(tiny, tmp_path / "b", other)
    again = train(config, other_split, [SMALL])
    losses = [[entry["loss"] for entry in one.history] for one in (trained, again)]
    assert losses[0] == losses[1]
    assert trained.history != again.history


def test_the_best_epoch_of_the_best_setting_counts(tiny, tmp_path, monkeypatch):
    config, split = world(tiny, tmp_path, circles())
    values = iter([0.1, 0.5, 0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(
        sasrec_training, "headline", lambda ranks: {"ndcg@10": next(values), "hit_rate@10": 0.0}
    )
    other = dataclasses.replace(SMALL, dim=8)
    trained = train(config, split, [SMALL, other])
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3, 1, 2, 3]
    assert [entry["dim"] for entry in trained.history] == [16, 16, 16, 8, 8, 8]
    assert trained.settings["epoch"] == 2  # the first of equals
    assert trained.settings["dim"] == 16
    assert trained.budget == "pooled data, 2 epochs"
    # What scores is the model of that epoch, untouched by those after it.
    histories = [split.train.interactions.history(user) for user in range(20)]
    epochs = epochs_of(histories, SMALL, config.seed)
    next(epochs)
    model, _ = next(epochs)
    queries = range(len(split.validation.users))
    expected = model.score(split.validation.histories)
    assert np.array_equal(trained.score(split.validation, queries), expected)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(DataError, match="no training history has two items"):
        next(epochs_of([np.array([1]), np.array([], int)], SMALL, 0))
    hot = dataclasses.replace(SMALL, lr=float("inf"))
    with pytest.raises(TrainingError, match="epoch 1 is not finite"):
        next(epochs_of([np.array([1, 2, 3])] * 20, hot, 0))


def test_the_grid_is_small_and_begins_with_the_default():
    assert sasrec_training.GRID[0] == Settings()
    assert len(set(sasrec_training.GRID)) == 3


def test_train_takes_what_the_command_gives(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles(), data__split="last_fraction")
    trained = functools.partial(train, settings=[SMALL])(config, split)
    rows, per_user = measuring.measure(trained, split, config)
    [row] = [
        row
        for row in rows
        if (row.split, row.candidates, row.metric, row.k) == ("validation", "full", "ndcg", 10)
    ]
    assert row.value == max(entry["ndcg@10"] for entry in trained.history)
    assert per_user["validation"]["users"] == split.validation.users.tolist()
