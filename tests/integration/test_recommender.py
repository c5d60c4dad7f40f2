"""A published adapter elsewhere: equal scores, other catalogues, other bases, going on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pfm_llm.base import files
from pfm_llm.base.errors import (
    ArtefactError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    DataError,
)
from pfm_llm.cli.main import make_app
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.schema import load_config
from pfm_llm.data.history import History
from pfm_llm.data.interactions import Catalogue
from pfm_llm.federated import FederatedRecommender
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import Parts
from pfm_llm.publish.artefact import MANIFEST_FILE, read_artefact
from pfm_llm.publish.manifest import Manifest
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.run import load_corpus
from tests.support.tiny import TITLES, Tiny, metrics_of, results_of, tensor_files

HISTORY = ["i3", "i4", "i6"]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("published")
    return run_experiment(tiny.config(output, federation__server__lr_lora=0.02))


@pytest.fixture(scope="module")
def model(run: Path, tiny: Tiny) -> Recommender:
    return from_folder(run / "shared_adapter", tiny)


def from_folder(
    folder: Path, tiny: Tiny, catalogue: Catalogue | str | None = None, allow: bool = False
) -> Recommender:
    return Recommender.from_pretrained(
        folder,
        catalogue=catalogue or str(tiny.items),
        backbone=str(tiny.model),
        allow_base_mismatch=allow,
    )


def catalogue_of(*numbers: int, extra: tuple[str, ...] = ()) -> Catalogue:
    ids = [f"i{number}" for number in numbers] + [f"new{k}" for k in range(len(extra))]
    return Catalogue(tuple(ids), {"title": (*(TITLES[number] for number in numbers), *extra)})


def test_scores_are_those_of_the_run(run: Path, tiny: Tiny, model: Recommender) -> None:
    opened, trained = open_run(run)
    items = opened.data.interactions.history(5)
    window = opened.model.encoder.query_window(History(items))
    batch = collate([[window]], [opened.clients.cache.states([window], "x")], last_only=True)
    stacked = opened.scorer.stack(trained.shared, {}, 1)
    expected = opened.model.model.scores(batch, stacked, Parts(private_weight=0.0))[0]
    ids = [opened.data.interactions.catalogue.item_ids[i] for i in items]
    np.testing.assert_allclose(model.score(ids), expected.numpy(), atol=1e-5)
    assert model.alignment.num_kept == len(TITLES)


def test_recommends_unseen_items_best_first(model: Recommender) -> None:
    listed = model.recommend(HISTORY, k=5)
    scores = [item.score for item in listed]
    assert scores == sorted(scores, reverse=True)
    assert not {item.item_id for item in listed} & set(HISTORY)


def test_a_user_of_the_run_gets_the_same_list_with_their_private_adapter(
    run: Path, model: Recommender
) -> None:
    config = load_config(run / "config.yaml")
    interactions = load_corpus(config).interactions
    items = [interactions.catalogue.item_ids[i] for i in interactions.history(0)]
    store = RunFolders.of(run).private
    private = PrivateStore(store).load_personalised(f"user-{interactions.user_ids[0]}")
    ours = model.recommend(items, private=private)
    theirs = Recommender.from_pretrained(run, interactions.user_ids[0]).recommend()
    assert [item.item_id for item in ours] == [item.item_id for item in theirs]


def test_items_follow_their_keys_to_another_catalogue(
    model: Recommender, run: Path, tiny: Tiny
) -> None:
    numbers = [7, 3, 4, 6, 20, 11]
    other = from_folder(run / "shared_adapter", tiny, catalogue_of(*numbers, extra=("old moon",)))
    assert other.alignment.num_kept == 6
    assert "24 others are dropped, and 1 items that it never saw" in other.alignment.describe()
    np.testing.assert_allclose(other.score(HISTORY)[:6], model.score(HISTORY)[numbers], atol=1e-5)
    bias = other.parts.shared.tensors["head.item_bias"]
    assert torch.isclose(bias[6], model.parts.shared.tensors["head.item_bias"].mean())


def test_new_items_get_their_share_of_the_places(run: Path, tiny: Tiny) -> None:
    extra = ("old moon", "red moon", "blue moon", "new moon")
    other = from_folder(run / "shared_adapter", tiny, catalogue_of(*range(27), extra=extra))
    assert other.is_new[27:].all()
    shares = {share: other.recommend(HISTORY, new_share=share) for share in (None, 0.0, 0.4)}
    counts = {
        share: sum(other.is_new[other._index[item.item_id]] for item in items)
        for share, items in shares.items()
    }
    left = len(other.catalogue) - len(HISTORY)
    assert counts[None] >= 10 * sum(other.is_new) // left >= 1
    assert counts[0.4] >= 4 > counts[0.0]
    for items in shares.values():
        assert len(items) == 10
        scores = [item.score for item in items]
        assert scores == sorted(scores, reverse=True)
    with pytest.raises(ConfigError, match=r"new_share: 2 is no share"):
        other.recommend(HISTORY, new_share=2)


def test_the_whitening_is_never_refitted(model: Recommender, run: Path, tiny: Tiny) -> None:
    other = from_folder(run / "shared_adapter", tiny, catalogue_of(1, 2, 3))
    assert torch.equal(other.parts.normaliser.mean, model.parts.normaliser.mean)
    assert torch.equal(other.parts.normaliser.basis, model.parts.normaliser.basis)


def test_another_text_under_the_same_id_is_another_item(run: Path, tiny: Tiny) -> None:
    catalogue = Catalogue(("i0", "i1"), {"title": ("something else", TITLES[1])})
    assert from_folder(run / "shared_adapter", tiny, catalogue).alignment.rows == (None, 1)


def test_a_new_user_makes_it_personal(model: Recommender, tmp_path: Path) -> None:
    private = model.personalise(HISTORY, tmp_path / "me", steps=3)
    assert (tmp_path / "me").stat().st_mode & 0o777 == 0o700
    kept = model.load_private(tmp_path / "me")
    assert kept is not None
    assert all(torch.equal(kept.tensors[n], private.tensors[n]) for n in private.tensors)
    shared_only = model.score(HISTORY)
    assert np.abs(model.score(HISTORY, private=private) - shared_only).max() > 1e-4
    np.testing.assert_array_equal(
        model.score(HISTORY, private=private, private_weight=0.0), shared_only
    )
    assert model.load_private(tmp_path / "nobody") is None


def test_a_private_part_of_a_federation_is_loaded_by_client(run: Path, model: Recommender) -> None:
    folder = RunFolders.of(run).private
    with pytest.raises(DataError, match=r"parts of \d+ clients \(user-u0, .*give client_id"):
        model.load_private(folder)
    private = model.load_private(folder, "user-u3")
    kept = PrivateStore(folder).load_personalised("user-u3")
    assert private is not None
    assert kept is not None
    assert all(torch.equal(kept.tensors[n], private.tensors[n]) for n in private.tensors)
    assert model.load_private(folder, "user-nobody") is None


def test_a_recommender_of_a_run_knows_its_user(run: Path, model: Recommender) -> None:
    own = Recommender.from_pretrained(run, "u3")
    assert own.owner is not None
    met = {own.catalogue.item_ids[i] for i in own.owner.history.items}
    listed = own.recommend()
    assert not met & {item.item_id for item in listed}
    ids = [own.catalogue.item_ids[i] for i in own.owner.history.items]
    np.testing.assert_array_equal(own.score(), own.score(ids))
    assert np.abs(own.score() - own.score(private_weight=0.0)).max() > 1e-4
    np.testing.assert_allclose(own.score(private_weight=0.0), model.score(ids), atol=1e-5)
    assert own.recommend(HISTORY) != Recommender.from_pretrained(run).recommend(HISTORY)


def test_candidates_are_scored_as_in_the_whole_catalogue(model: Recommender) -> None:
    wanted = ["i20", "i2", "i11"]
    np.testing.assert_array_equal(model.score(HISTORY, wanted), model.score(HISTORY)[[20, 2, 11]])


def test_a_run_takes_a_user_and_an_adapter_a_history(run: Path, model: Recommender) -> None:
    with pytest.raises(DataError, match="no user 'zzz' in the data; users are u"):
        Recommender.from_pretrained(run, "zzz")
    with pytest.raises(DataError, match="no history; give one"):
        model.recommend()
    with pytest.raises(ConfigError, match="a run has a catalogue and a base model of its own"):
        Recommender.from_pretrained(run, "u3", "items.csv")
    with pytest.raises(ConfigError, match=r"shared_adapter is no run"):
        Recommender.from_pretrained(run / "shared_adapter", "u3")


def test_unknown_items_and_short_histories_are_refused(model: Recommender, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no item 'zzz' in the catalogue of 30 items"):
        model.recommend(["i1", "zzz"])
    with pytest.raises(DataError, match="no next item"):
        model.personalise(["i1"], tmp_path / "me")
    with pytest.raises(DataError, match="empty history"):
        model.personalise([], tmp_path / "me")


def test_an_empty_history_recommends_by_the_biases_of_the_items(model: Recommender) -> None:
    biases = model.parts.shared.tensors["head.item_bias"]
    listed = model.recommend([], k=5)
    assert [item.item_id for item in listed] == [
        f"i{n}" for n in biases.argsort(descending=True)[:5]
    ]
    np.testing.assert_allclose(model.score([], ["i7", "i2"]), biases[[7, 2]], atol=1e-6)


def test_an_empty_history_is_served_by_a_federation_and_on_the_command_line(
    run: Path, model: Recommender
) -> None:
    federation = FederatedRecommender()
    federation._run = run
    expected = [item.item_id for item in model.recommend([], k=4)]
    assert [item.item_id for item in federation.recommender().recommend([], k=4)] == expected
    words = ["recommend", "--run", str(run), "--history", "", "-n", "4", "--json"]
    shown = CliRunner().invoke(make_app(), words)
    assert shown.exit_code == 0, shown.stderr
    assert [item["item_id"] for item in json.loads(shown.stdout)["items"]] == expected
    assert "history: empty" in shown.stderr


def test_an_empty_history_on_other_items_is_ranked_by_what_texts_are_worth(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    others = Catalogue(("a", "b", "c"), {"title": ("old moon", "red star", "big moon")})
    with pytest.raises(DataError, match=r"all items are new .*with head\.item_dropout"):
        from_folder(run / "shared_adapter", tiny, others).recommend([])
    settings = {"method": "pfm", "head__item_dropout": 0.3}
    learned = run_experiment(tiny.config(tmp_path, **settings))
    scores = from_folder(learned / "shared_adapter", tiny, others).score([])
    assert len(set(scores.tolist())) == 3


def test_an_empty_history_needs_biases(tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, head__item_bias=False))
    with pytest.raises(DataError, match=r"empty history.*train with head\.item_bias"):
        Recommender.from_pretrained(run).recommend([])


def test_scores_that_are_not_finite_are_an_error(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    other = from_folder(run / "shared_adapter", tiny)
    other.parts.shared.tensors["head.state_proj"].fill_(1e38)
    with pytest.raises(ArtefactError, match="not finite"):
        other.recommend(HISTORY)


def test_a_manifest_cannot_have_a_path_opened(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(run / "shared_adapter", folder)
    path = folder / MANIFEST_FILE
    manifest = Manifest.from_bytes(path.read_bytes(), "it")
    for changes in ({"name": str(tiny.model)}, {"name": ".."}, {"embedded": str(tiny.model)}):
        base = manifest.base.model_copy(update=changes)
        path.write_bytes(manifest.model_copy(update={"base": base}).to_bytes())
        with pytest.raises(ArtefactError, match="neither embedded nor a Hub id; pass backbone"):
            Recommender.from_pretrained(folder, catalogue=str(tiny.items))


def test_a_taste_is_read_off_a_single_item(tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, method="pfm"))
    model = from_folder(run / "shared_adapter", tiny)
    private = model.personalise(["i1"], tmp_path / "me")
    assert private.tensors["private.taste.next_item"].any()
    assert np.any(model.score(["i1"], private=private) != model.score(["i1"]))


def test_catalogue_and_base_that_nobody_else_has_must_be_given(run: Path, tiny: Tiny) -> None:
    folder = run / "shared_adapter"
    with pytest.raises(DataError, match=r"trained on 'interactions\.csv'.*pass catalogue"):
        Recommender.from_pretrained(folder, backbone=str(tiny.model))
    with pytest.raises(ArtefactError, match="local model called 'model'; pass backbone"):
        Recommender.from_pretrained(folder, catalogue=str(tiny.items))


def other_weights(tiny: Tiny, folder: Path) -> Tiny:
    """The same model with one number changed."""
    shutil.copytree(tiny.model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return dataclasses.replace(tiny, model=folder)


def test_other_base_weights_are_refused_by_both_names(
    run: Path, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = other_weights(tiny, tmp_path / "base-b")
    with pytest.raises(ArtefactError, match=r"weights of model have SHA-256 .*those of .*base-b"):
        from_folder(run / "shared_adapter", changed)
    allowed = from_folder(run / "shared_adapter", changed, allow=True)
    assert "going on, as asked" in caplog.text
    assert len(allowed.recommend(HISTORY)) == 10


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "recommender_head.safetensors", "item_keys.json"]
)
def test_a_damaged_file_is_named(name: str, run: Path, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(run / "shared_adapter", tmp_path / "copy")
    content = bytearray((tmp_path / "copy" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{name} is not the file that the manifest lists"):
        from_folder(tmp_path / "copy", tiny)
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(CorruptFileError, match=f"{name} is missing"):
        from_folder(tmp_path / "copy", tiny)


def test_a_folder_without_manifest_is_none_of_ours(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ArtefactError, match=r"no pfm_manifest\.json"):
        from_folder(tmp_path, tiny)


def test_manifest_says_what_it_stands_on(run: Path, tiny: Tiny) -> None:
    manifest = read_artefact(run / "shared_adapter").manifest
    assert manifest.base.name == "model"
    assert manifest.round == 4
    assert {metric.mode for metric in manifest.metrics} >= {"shared_only", "shared_private"}
    text = (run / "shared_adapter" / MANIFEST_FILE).read_text()
    text += (run / "shared_adapter" / "training_config.yaml").read_text()
    assert str(tiny.model.parent) not in text
    assert str(run.parent) not in text


# --- going on ---------------------------------------------------------------------------------


def continued(tiny: Tiny, output: Path, adapter: Path, **more: object) -> Path:
    settings = {"federation__num_rounds": 2, "evaluation__every": 1, **more}
    config = tiny.config(output, name="more", init_from__adapter=str(adapter), **settings)
    return run_experiment(config)


def test_going_on_starts_where_the_adapter_stands(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    # A step so small that nothing moves: the evaluation must be the parent's.
    rates = {
        f"federation__server__lr_{n}": 1e-12 for n in ("lora", "head", "item_ids", "item_bias")
    }
    more = continued(tiny, tmp_path, run / "shared_adapter", **rates)
    ndcg = {
        (row["mode"], row["metric"], row["k"]): row["value"]
        for row in results_of(run)["rows"]
        if row["mode"] != "none" and row["candidates"] == "full" and row["mode"] == "shared_only"
    }
    for row in results_of(more)["rows"]:
        key = (row["mode"], row["metric"], row["k"])
        if row["mode"] != "none" and row["candidates"] == "full" and key in ndcg:
            assert row["value"] == pytest.approx(ndcg[key], abs=1e-6)
    parent = read_artefact(run / "shared_adapter")
    [link] = read_artefact(more / "shared_adapter").manifest.parents
    assert (link.relation, link.manifest_sha256) == ("trained_from", parent.manifest_sha256)
    assert link.repo == "shared_adapter"


def test_going_on_learns_and_needs_the_parent_no_more(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(run / "shared_adapter", tmp_path / "parent")
    more = continued(tiny, tmp_path / "a", tmp_path / "parent")
    shutil.rmtree(tmp_path / "parent")
    config = load_config(more / "config.yaml")
    before = tensor_files(more), metrics_of(more)
    run_experiment(config, resume=True, from_round=2)
    assert (tensor_files(more), metrics_of(more)) == before
    changed = read_artefact(more / "shared_adapter").shared_tensors()
    started = read_artefact(more / "initial_adapter").shared_tensors()
    assert all(not torch.equal(changed[name], started[name]) for name in started)


def test_going_on_with_other_shapes_names_the_settings(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=r"not fit the config: lora.* shared: \{[^}]*rank: 2"):
        continued(tiny, tmp_path, run / "shared_adapter", adapters__shared__rank=4)
    with pytest.raises(ArtefactError, match=r"head\.item_bias is \[30\] there and absent here"):
        continued(tiny, tmp_path, run / "shared_adapter", head__item_bias=False)
    assert list(tmp_path.iterdir()) == []


def test_going_on_with_another_taste_names_its_settings(tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path, method="pfm", adapters__private__taste__read_rank=8))
    with pytest.raises(ArtefactError, match=r"read_in is \[30, 8\] .*taste: \{[^}]*read_rank: 8"):
        continued(
            tiny,
            tmp_path / "more",
            run / "shared_adapter",
            method="pfm",
            adapters__private__taste__read_rank=4,
        )


def test_a_start_from_another_adapter_cannot_be_resumed_as_this_one(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    more = continued(tiny, tmp_path, run / "shared_adapter")
    config = load_config(more / "config.yaml").model_copy(update={"init_from": None})
    with pytest.raises(CheckpointError, match="init_from"):
        run_experiment(config, resume=True)


def test_push_at_rounds_that_are_not_committed_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub\.every: 3 is not a multiple"):
        tiny.config(tmp_path, push_to_hub__repo="a/b", push_to_hub__every=3)


def test_tampered_manifest_fails(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(run / "shared_adapter", tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST_FILE
    manifest = Manifest.from_bytes(path.read_bytes(), "it")
    files.write_bytes(path, manifest.model_copy(update={"num_items": 29}).to_bytes())
    with pytest.raises(ArtefactError, match=r"float32\[30\], expected float32\[29\]"):
        from_folder(tmp_path / "copy", tiny)


def test_ids_that_are_numbers_may_be_given_as_numbers() -> None:
    model = object.__new__(Recommender)
    model._index = {"50": 0, "7": 1}
    mixed: list[str] = [7, "50", np.int64(7)]  # type: ignore[list-item]
    assert model.items(mixed).tolist() == [1, 0, 1]
