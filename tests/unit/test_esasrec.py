"""eSASRec: its layer and its loss by hand, causality, a pattern it must learn, and a fair grid."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.baselines import esasrec_model, measuring, sasrec_training
from benchmarks.baselines.esasrec_model import ESasRec, ESettings, LigrLayer
from benchmarks.baselines.sasrec_model import NO_TARGET
from benchmarks.baselines.sasrec_training import train
from pfm_llm.evaluation.metrics import ndcg
from tests.support.trained_baselines import NUM_ITEMS, circles, without_test, world

SMALL = ESettings(dim=16, window=4, batch=8, epochs=3, dropout=0.0, lr=1e-2, negatives=10)


def model_of(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ESasRec(NUM_ITEMS, dataclasses.replace(SMALL, **changes)).eval()


def test_a_layer_gates_what_it_adds_by_the_state_before_it():
    """One position attends to itself alone, so attention is its value, projected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = LigrLayer(SMALL).eval()
        x = torch.randn(1, 1, 16)
    attention = layer.attention
    value = attention.in_proj_weight[32:] @ layer.norms[0](x)[0, 0] + attention.in_proj_bias[32:]
    attended = attention.out_proj(value)
    y = x[0, 0] + torch.sigmoid(layer.gates[0](x[0, 0])) * attended
    gate, value = (layer.up.weight @ layer.norms[1](y)).split(64)
    expected = y + torch.sigmoid(layer.gates[1](y)) * (
        layer.down.weight @ (functional.silu(gate) * value)
    )
    assert torch.allclose(layer(x, torch.zeros(1, 1))[0, 0], expected, atol=1e-5)


def test_a_state_sees_nothing_later():
    model = model_of()
    states = model(torch.tensor([[1, 2, 3, 4], [1, 2, 9, 8]]))
    assert torch.allclose(states[0, :2], states[1, :2], atol=1e-6)
    assert not torch.allclose(states[0, 2], states[1, 2], atol=1e-3)


def test_the_loss_is_a_softmax_over_the_target_and_the_negatives(monkeypatch):
    """Negative 7 is the first target: it is left out there and counts at the other position."""
    model = model_of(negatives=2)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(7, n))
    items, targets = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.full((2, 3), NO_TARGET)
    targets[0, 1], targets[1, 0] = 7, 5
    states, weight = model(items), model.items.weight
    logits = [weight[[7, 8]] @ states[0, 1], weight[[5, 7, 8]] @ states[1, 0]]
    expected = [torch.logsumexp(own, 0) - own[0] for own in logits]
    assert model.loss(items, targets).item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)


def test_with_the_whole_catalogue_as_negatives_it_is_the_full_cross_entropy():
    model = model_of(negatives=10 * NUM_ITEMS)
    items, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    full = functional.cross_entropy(model(items)[0] @ model.items.weight.T, targets[0])
    assert model.loss(items, targets).item() == pytest.approx(full.item(), rel=1e-5)


def test_it_learns_what_comes_next_without_a_look_at_test(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles())
    settings = [dataclasses.replace(SMALL, epochs=25)]
    trained = train(config, without_test(split), settings, esasrec_model.METHOD, ESasRec)
    assert trained.method == "esasrec"
    assert trained.settings["negatives"] == 10
    negatives = measuring.negatives_of(split.test, split, config)
    assert ndcg(measuring.rank(trained.score, split.test, negatives).full, 10).mean() > 0.9


def test_equal_seeds_draw_equal_negatives(tiny, tmp_path):
    config, split = world(tiny, tmp_path, circles())
    losses = [
        [entry["loss"] for entry in train(config, split, [SMALL], "esasrec", ESasRec).history]
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert np.isfinite(losses).all()


def test_its_grid_has_as_many_trials_as_that_of_sasrec():
    trials = [[s.epochs for s in module.GRID] for module in (esasrec_model, sasrec_training)]
    assert trials[0] == trials[1]
    assert len(set(esasrec_model.GRID)) == 3
    assert esasrec_model.GRID[0] == ESettings()
