"""PFedRec: against plain SGD one client at a time, and what its negatives give away."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.baselines import measuring, pfedrec_model, pfedrec_training
from benchmarks.baselines.pfedrec_model import Examples, Settings, initial_state, take_round
from benchmarks.baselines.pfedrec_training import (
    Negatives,
    draw_examples,
    honest_pools,
    published_pools,
    train,
)
from pfm_llm.base.errors import TrainingError
from tests.support.trained_baselines import NUM_ITEMS, circles, without_test, world

SMALL = Settings(dim=4, lr_eta=1.0, rounds=3, batch=4)


def some_examples(sizes, num_items=7):
    random = np.random.default_rng(0)
    return [
        Examples(
            random.integers(0, num_items, size), random.integers(0, 2, size).astype(np.float32)
        )
        for size in sizes
    ]


def one_client(items, theta, bias, examples, settings):
    """The published loop: per batch a step of the layer, then one of the embeddings."""
    items, theta, bias = (t.clone().requires_grad_() for t in (items, theta, bias))
    layer = torch.optim.SGD([theta, bias], lr=settings.lr)
    table = torch.optim.SGD([items], lr=settings.lr * settings.lr_eta * len(items))
    losses = []
    for start in range(0, len(examples.items), settings.batch):
        part = slice(start, start + settings.batch)
        for optimizer in (layer, table):
            logits = items[torch.from_numpy(examples.items[part])] @ theta + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, torch.from_numpy(examples.labels[part])
            )
            if optimizer is layer:
                losses.append(loss.item() * logits.numel())
            layer.zero_grad()
            table.zero_grad()
            loss.backward()
            optimizer.step()
    return items.detach(), theta.detach(), bias.detach(), sum(losses) / len(examples.items)


@pytest.mark.parametrize("floats", [1 << 24, 60, 1])
def test_a_round_equals_sgd_one_client_at_a_time(monkeypatch, floats):
    monkeypatch.setattr(pfedrec_model, "_FLOATS_AT_ONCE", floats)  # all at once, 2, 1
    examples = some_examples([9, 0, 3, 4, 1])
    state = initial_state(5, 7, SMALL.dim, seed=3)
    state = dataclasses.replace(state, weights=torch.randn_like(state.weights))
    before = [tensor.clone() for tensor in (state.items, state.weights, state.biases)]
    done = take_round(state, examples, SMALL)
    takers = [0, 2, 3, 4]
    alone = {
        user: one_client(
            state.items, state.weights[user], state.biases[user], examples[user], SMALL
        )
        for user in takers
    }
    average = torch.stack([alone[user][0] for user in takers]).mean(0)
    assert torch.allclose(done.state.items, average, atol=1e-5)
    assert done.loss == pytest.approx(np.mean([alone[user][3] for user in takers]), rel=1e-5)
    for user, (items, theta, bias, _) in alone.items():
        assert torch.allclose(done.state.weights[user], theta, atol=1e-5)
        assert torch.allclose(done.state.biases[user], bias, atol=1e-5)
        assert done.scores[user] == pytest.approx((items @ theta + bias).numpy(), abs=1e-4)
    # Who has no examples keeps its layer, and ranks with the embeddings as they were sent.
    assert torch.equal(done.state.weights[1], state.weights[1])
    expected = state.items @ state.weights[1] + state.biases[1]
    assert done.scores[1] == pytest.approx(expected.numpy(), abs=1e-5)
    after = (state.items, state.weights, state.biases)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_round_without_examples_changes_nothing():
    state = initial_state(2, 7, 4, seed=0)
    done = take_round(state, some_examples([0, 0]), SMALL)
    assert torch.equal(done.state.items, state.items)
    assert done.loss == 0


def test_all_clients_start_alike():
    state = initial_state(3, 7, 4, seed=0)
    assert state.weights.shape == (3, 4)
    assert torch.equal(state.weights[0], state.weights[2])
    assert state.weights.abs().max() <= 1 / 2
    assert not torch.equal(initial_state(3, 7, 4, seed=1).items, state.items)


def test_examples_are_the_history_and_draws_from_the_pool():
    history, pool = np.array([4, 5], np.int32), np.array([0, 1])
    drawn = draw_examples(history, pool, 3, np.random.default_rng(0))
    assert sorted(drawn.items[drawn.labels == 1].tolist()) == [4, 5]
    negatives = drawn.items[drawn.labels == 0]
    assert len(negatives) == 6
    assert set(negatives.tolist()) == {0, 1}
    assert drawn.labels.tolist() != sorted(drawn.labels.tolist(), reverse=True)  # shuffled
    other = draw_examples(history, pool, 3, np.random.default_rng(1))
    assert other.items.tolist() != drawn.items.tolist()


def test_examples_of_empty_histories_and_pools():
    random = np.random.default_rng(0)
    assert len(draw_examples(np.array([], np.int32), np.array([0]), 4, random).items) == 0
    full = draw_examples(np.array([0, 1]), np.array([], np.int64), 4, random)
    assert sorted(full.items.tolist()) == [0, 1]
    assert full.labels.tolist() == [1, 1]


def test_pools_honest_and_leaking(tiny, tmp_path):
    _, split = world(tiny, tmp_path, circles())
    honest, published = honest_pools(split.train), published_pools(split)
    for user in (0, 13):
        history = circles()[split.train.interactions.user_ids[user]]
        assert set(honest[user]) == set(range(NUM_ITEMS)) - set(history[:-2])
        assert set(published[user]) == set(range(NUM_ITEMS)) - set(history)


def test_the_counter_scorer_is_at_chance_with_honest_negatives_alone(tiny, tmp_path):
    """It knows only how often an item was drawn as a user's negative: the rarer, the better."""
    config, split = world(tiny, tmp_path, circles(num_users=60))

    def mean_rank(pools):
        counts = np.zeros((60, NUM_ITEMS), np.float32)
        for user, pool in enumerate(pools):
            history = split.train.interactions.history(user)
            for number in range(30):
                random = np.random.default_rng([user, number])
                drawn = draw_examples(history, pool, 4, random)
                np.add.at(counts[user], drawn.items[drawn.labels == 0], 1)
        ranks = measuring.rank(
            lambda _, queries: -counts[list(queries)],
            split.test,
            measuring.negatives_of(split.test, split, config),
        )
        return ranks.full.mean()

    assert mean_rank(published_pools(split)) == 1
    # 22 unseen items: 11.5 by chance, its standard error 6.3 / √60 = 0.8.
    assert 9 < mean_rank(honest_pools(split.train)) < 14


def test_each_round_draws_negatives_anew(tiny, tmp_path, monkeypatch):
    config, split = world(tiny, tmp_path, circles())
    drawn = []

    def spy(state, examples, settings):
        drawn.append(sorted(examples[0].items[examples[0].labels == 0].tolist()))
        return take_round(state, examples, settings)

    monkeypatch.setattr(pfedrec_training, "take_round", spy)
    train(config, split, [SMALL], Negatives.HONEST)
    assert len(set(map(tuple, drawn))) == 3


def test_scores_are_those_of_the_users_who_are_asked(tiny, tmp_path):
    histories = {"u00": [1, 2], **circles()}  # u00 has too few events to be asked
    _, split = world(tiny, tmp_path, histories, data__min_interactions=1)
    assert split.test.users[3:5].tolist() == [4, 5]
    scores = np.arange(21.0)[:, None] + np.zeros(NUM_ITEMS)
    own = pfedrec_training._Scorer(scores)(split.test, range(3, 5))
    assert own[:, 0].tolist() == [4, 5]


def test_honest_training_never_reads_the_test_split(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles())
    trained = train(config, without_test(split), [SMALL], Negatives.HONEST)
    assert trained.method == "pfedrec"
    with pytest.raises(AssertionError, match="test split was read"):
        train(config, without_test(split), [SMALL], Negatives.PUBLISHED)


def test_honest_training_does_not_train_on_validation(tiny, tmp_path):
    config, split = world(tiny, tmp_path / "a", circles())
    other = {u: [*items[:-2], items[0] - 3, items[0] - 4] for u, items in circles().items()}
    other = {u: [item % NUM_ITEMS for item in items] for u, items in other.items()}
    _, other_split = world(tiny, tmp_path / "b", other)

    def losses(negatives):
        runs = [train(config, one, [SMALL], negatives) for one in (split, other_split)]
        assert runs[0].history != runs[1].history
        return [[entry["loss"] for entry in run.history] for run in runs]

    honest, published = losses(Negatives.HONEST), losses(Negatives.PUBLISHED)
    assert honest[0] == honest[1]
    assert published[0] != published[1]


def test_published_negatives_are_flagged_and_flatter(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles(num_users=40))
    settings = [dataclasses.replace(SMALL, dim=8, lr_eta=20.0, rounds=10)]
    values = {}
    for negatives in Negatives:
        trained = train(config, split, settings, negatives)
        rows, _ = measuring.measure(trained, split, config)
        [row] = [
            row
            for row in rows
            if (row.split, row.candidates, row.metric, row.k) == ("test", "full", "ndcg", 5)
        ]
        values[row.method] = row.value
    assert values.keys() == {"pfedrec", "pfedrec_published_leaking"}
    assert values["pfedrec_published_leaking"] > values["pfedrec"] + 0.2


def test_it_learns_two_tastes(tiny, tmp_path):
    """Half of the users meet items of the first half alone, the others of the second."""
    draw = np.random.default_rng(0)
    histories = {
        f"u{user}": (15 * (user % 2) + draw.permutation(15)[:10]).tolist() for user in range(40)
    }
    config, split = world(tiny, tmp_path, histories)
    setting = Settings(dim=8, lr=0.5, lr_eta=0.3, num_negatives=1, batch=16, rounds=60)
    trained = train(config, split, [setting], Negatives.HONEST)
    gaps = []
    for row, history in zip(
        trained.score(split.test, range(40)), split.test.histories, strict=True
    ):
        own = np.arange(30) // 15 == history[0] // 15
        unseen = ~np.isin(np.arange(30), history)
        gaps.append(row[own & unseen].mean() - row[~own].mean())
    assert np.mean(gaps) > 1


def test_the_best_round_counts(tiny, tmp_path, monkeypatch):
    config, split = world(tiny, tmp_path, circles())
    values = iter([0.1, 0.5, 0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(
        pfedrec_training, "headline", lambda ranks: {"ndcg@10": next(values), "hit_rate@10": 0.0}
    )
    trained = train(config, split, [SMALL, dataclasses.replace(SMALL, dim=2)], Negatives.HONEST)
    assert [entry["round"] for entry in trained.history] == [1, 2, 3, 1, 2, 3]
    assert (trained.settings["round"], trained.settings["dim"]) == (2, 4)
    assert trained.budget == "2 rounds x 20 clients"
    monkeypatch.undo()
    two = train(config, split, [dataclasses.replace(SMALL, rounds=2)], Negatives.HONEST)
    ranks = measuring.rank(
        trained.score, split.validation, measuring.negatives_of(split.validation, split, config)
    )
    assert np.mean(1 / np.log2(1 + ranks.full) * (ranks.full <= 10)) == pytest.approx(
        two.history[1]["ndcg@10"]
    )


def test_scores_that_are_not_finite_stop_the_run(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles())
    hot = dataclasses.replace(SMALL, lr=1e30)
    with pytest.raises(TrainingError, match="round 1 are not finite"):
        train(config, split, [hot], Negatives.HONEST)


def test_the_grid_is_small_and_begins_with_the_published_setting():
    assert pfedrec_training.GRID[0] == Settings()
    assert len(set(pfedrec_training.GRID)) == 3
