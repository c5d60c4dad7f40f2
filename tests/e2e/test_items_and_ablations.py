"""Item vectors of every encoder, and every ablation, from training to a published adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import ArtefactError, ConfigError
from pfm_llm.client.trunk_cache import trunk_states
from pfm_llm.config.choices import Ablation
from pfm_llm.data.history import History
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.opening import open_run
from tests.support.tiny import Tiny, results_of, write_encoder

SMALL: dict[str, Any] = {
    "method": "pfm",
    "federation__num_rounds": 3,
    "evaluation__baselines": [],
}
HISTORY = ["i3", "i4", "i6"]


def published(run: Path, tiny: Tiny) -> Recommender:
    return Recommender.from_pretrained(
        run / "shared_adapter", catalogue=str(tiny.items), backbone=str(tiny.model)
    )


@pytest.mark.parametrize("what", [one for one in Ablation if one is not Ablation.NONE])
def test_every_ablation_trains_and_is_measured(what: Ablation, tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, **SMALL, ablation=what.value))
    rows = [row for row in results_of(run)["rows"] if row["mode"] == "shared_private"]
    assert rows
    own = Recommender.from_pretrained(run).score(HISTORY)
    assert np.isfinite(own).all()
    if what in (Ablation.RANDOM_WEIGHTS, Ablation.SHUFFLED_TEXTS):
        with pytest.raises(ArtefactError, match=f"ablation: {what}"):
            published(run, tiny)
    else:
        np.testing.assert_allclose(published(run, tiny).score(HISTORY), own, atol=1e-5)


def test_without_a_pass_the_text_of_the_history_has_no_effect(tiny: Tiny, tmp_path: Path) -> None:
    run, trained = open_run(
        run_experiment(tiny.config(tmp_path, **SMALL, ablation="no_pass", name="none"))
    )
    assert run.model.trunk is None
    before = run.model.table.initial_state().tensors
    same = {n for n, value in trained.shared.tensors.items() if torch.equal(value, before[n])}
    assert {n for n in before if n.startswith("lora.")} < same
    assert "head.context_proj" not in same


@pytest.mark.parametrize("items", [{"pooling": "mean"}, {"encoder": "encoder"}])
def test_items_of_another_space_than_the_histories(
    items: dict[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    has_encoder = "encoder" in items
    if has_encoder:
        write_encoder(tmp_path / "encoder")
    encoder = str(tmp_path / "encoder") if has_encoder else "backbone"
    items = {**items, "encoder": encoder}
    run = run_experiment(tiny.config(tmp_path, **SMALL, items=items))
    _, (of_states, of_items) = read_artefact(run / "shared_adapter").contents()
    assert of_states.basis.shape == (32, 32)
    width = 24 if has_encoder else 32
    assert of_items.basis.shape == (width, width)
    assert not torch.equal(of_items.basis[:8, :8], of_states.basis[:8, :8])
    own = Recommender.from_pretrained(run).score(HISTORY)
    if not has_encoder:
        np.testing.assert_allclose(published(run, tiny).score(HISTORY), own, atol=1e-5)


def test_which_items_were_met_is_learned_by_updates_alone(tiny: Tiny, tmp_path: Path) -> None:
    """After each client took part, just the items of some history are known to be met."""
    settings = {**SMALL, "federation__num_rounds": 6, "data__hold_out_items": 0.2}
    run = run_experiment(tiny.config(tmp_path, **settings, head__item_met=True))
    opened, trained = open_run(run)
    met = (trained.shared.tensors["head.item_met"] > 0).numpy()
    seen = np.zeros(len(met), dtype=bool)
    seen[opened.data.split.train.interactions.items] = True
    assert not seen.all()
    assert np.array_equal(met, seen)
    never = ~seen
    assert not trained.shared.tensors["head.item_bias"].numpy()[never].any()
    np.testing.assert_allclose(
        published(run, tiny).score(HISTORY[:1]),
        Recommender.from_pretrained(run).score(HISTORY[:1]),
        atol=1e-5,
    )


def test_the_bias_of_new_items_is_learned_beside_the_rest(tiny: Tiny, tmp_path: Path) -> None:
    """Hidden items move no other tensor by a bit, and a published adapter has the bias too."""
    settings = {**SMALL, "federation__num_rounds": 6, "data__hold_out_items": 0.2}
    runs = [
        run_experiment(tiny.config(tmp_path / str(share), **settings, head__item_dropout=share))
        for share in (0.0, 0.3)
    ]
    without, learned = (open_run(run)[1].shared.tensors for run in runs)
    added = {"head.new_bias", "head.new_text"}
    assert learned.keys() - without.keys() == added
    assert all(learned[name].any() for name in added)
    for name, tensor in without.items():
        assert torch.equal(tensor, learned[name]), name
    new = ~(learned["head.item_met"] > 0).numpy()
    before, after = (Recommender.from_pretrained(run).score(HISTORY[:1]) for run in runs)
    np.testing.assert_array_equal(before[~new], after[~new])
    assert (before[new] != after[new]).all()
    np.testing.assert_allclose(published(runs[1], tiny).score(HISTORY[:1]), after, atol=1e-5)


def test_an_encoder_that_is_narrower_than_the_text_space_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    write_encoder(tmp_path / "narrow", width=6)
    settings = {"items__encoder": str(tmp_path / "narrow")}
    with pytest.raises(ConfigError, match=r"head\.dim: 8 exceeds the width of the item encoder, 6"):
        run_experiment(tiny.config(tmp_path, **SMALL, **settings))


def test_histories_of_whole_items_from_training_to_a_published_adapter(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = {**SMALL, "window__reading": "items", "window__items": 6}
    run = run_experiment(tiny.config(tmp_path, **settings))
    assert not list(run.with_name("tiny.private").rglob("trunk/*")), "a user's states were kept"
    own = Recommender.from_pretrained(run)
    assert own.score(["i4", "i6", "i3"]).tolist() != own.score(HISTORY).tolist()
    np.testing.assert_allclose(published(run, tiny).score(HISTORY), own.score(HISTORY), atol=1e-5)


def test_states_of_items_are_those_of_a_window_of_one_item(tiny: Tiny, tmp_path: Path) -> None:
    """With one item the two readings are the same pass, if the history shows what the item is."""
    tokens, items = (
        run_experiment(tiny.config(tmp_path, **SMALL, name=name, window__reading=name))
        for name in ("tokens", "items")
    )
    (of_tokens, _), (of_items, _) = open_run(tokens), open_run(items)
    encoders = of_tokens.model.encoder, of_items.model.encoder
    history = History(np.array([3], np.int32))
    windows = [encoder.window(history) for encoder in encoders]
    read, composed = (
        trunk_states(run.model.trunk, [window])[0]
        for run, window in zip((of_tokens, of_items), windows, strict=True)
    )
    header = len(encoders[0].header_tokens)
    torch.testing.assert_close(composed[:header], read[:header], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(composed[-1], read[-1], rtol=1e-4, atol=1e-5)
