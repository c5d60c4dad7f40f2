"""A run that is opened again beside other data, items, prompt or base model."""

import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pfm_llm.base.errors import CheckpointError, CorruptFileError
from pfm_llm.base.files import sha256_of
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.opening import TRAINED_ON_FILE, open_run, open_to_serve
from pfm_llm.runs.study.run import study_run
from tests.support.tiny import Tiny, make_tiny

SETTINGS = {"evaluation__baselines": [], "federation__num_rounds": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny world in ``world`` and a finished run in ``runs/tiny``."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = make_tiny(folder / "world")
    tiny_prompt(folder)
    run_experiment(
        tiny.config(folder / "runs", prompt=str(folder / "next_item.v1.toml"), **SETTINGS)
    )
    return folder


def tiny_prompt(folder: Path) -> None:
    shipped = Path(__file__).parents[2] / "prompts" / "next_item.v1.toml"
    (folder / "next_item.v1.toml").write_text(shipped.read_text())


@pytest.fixture
def changed(trained: Path, tmp_path: Path) -> "Changed":
    """The finished run as it is, and its world put back after the test."""
    return Changed(trained, tmp_path / "kept")


class Changed:
    """A finished run, and the files that it was trained on."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept = folder, kept
        shutil.copytree(folder, kept)
        self.run = folder / "runs" / "tiny"
        self.world = Tiny(
            folder / "world/model", folder / "world/interactions.csv", folder / "world/items.csv"
        )

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)

    def rewrite(self, path: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> None:
        with path.open(newline="") as file:
            head, *rows = csv.reader(file)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([head, *change(rows)])

    def listed(self, user: str = "u1") -> list[tuple[str, float]]:
        found = Recommender.from_pretrained(self.run, user).recommend(k=8)
        return [(item.title, item.score) for item in found]

    def files(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.folder)): sha256_of(path)
            for path in sorted(self.run.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(autouse=True)
def put_back(changed: Changed):
    yield
    changed.restore()


def test_items_in_another_order_change_nothing(changed: Changed) -> None:
    listed, tensors = changed.listed(), open_run(changed.run)[1].shared.tensors
    results = json.loads((changed.run / "results.json").read_text())["rows"]
    exported = read_artefact(changed.run / "shared_adapter").item_keys()
    changed.rewrite(changed.world.items, lambda rows: sorted(rows, reverse=True))
    assert changed.listed() == listed
    again = open_run(changed.run)[1].shared.tensors
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    evaluate_run(changed.run)
    assert json.loads((changed.run / "results.json").read_text())["rows"] == results
    assert read_artefact(changed.run / "shared_adapter").item_keys() == exported


def without_newest(rows: list[list[str]]) -> list[list[str]]:
    """The rows without each user's last two."""
    by_user: dict[str, list[list[str]]] = {}
    for row in sorted(rows, key=lambda row: int(row[2])):
        by_user.setdefault(row[0], []).append(row)
    return [row for own in by_user.values() for row in own[:-2]]


@pytest.mark.parametrize("measure", [evaluate_run, partial(study_run, budget="small"), open_run])
def test_other_interactions_are_not_measured(
    measure: Callable[[Path], object], changed: Changed
) -> None:
    before = changed.files()
    changed.rewrite(changed.world.interactions, without_newest)
    with pytest.raises(CheckpointError, match=r"the interactions have changed \(24 users and"):
        measure(changed.run)
    assert changed.files() == before


def test_other_interactions_are_served_from(
    changed: Changed, caplog: pytest.LogCaptureFixture
) -> None:
    history = Recommender.from_pretrained(changed.run, "u2").owner
    assert history is not None
    listed = changed.listed("u2")
    changed.rewrite(changed.world.interactions, without_newest)
    served = Recommender.from_pretrained(changed.run, "u2")
    assert "since the training the interactions have changed" in caplog.text
    assert served.owner is not None
    assert len(served.owner.history) < len(history.history)
    # The same shared part, the same private one, the same history: the same scores.
    ids = [served.catalogue.item_ids[item] for item in history.history.items]
    again = served.recommend(ids, k=8, private=served.owner.private)
    assert [item.title for item in again] == [title for title, _ in listed]
    assert [item.score for item in again] == pytest.approx([score for _, score in listed], abs=1e-6)


def test_a_longer_catalogue_is_aligned_by_item(
    changed: Changed, caplog: pytest.LogCaptureFixture
) -> None:
    listed = changed.listed()
    changed.rewrite(changed.world.items, lambda rows: [["i999", "huge fish"], *rows])
    run, shared, alignment = open_to_serve(changed.run)
    assert "0 items have gone or have another text, and 1 are new" in caplog.text
    assert (alignment.num_kept, len(alignment.rows)) == (30, 31)
    assert shared.shared.tensors["head.item_bias"].shape == (31,)
    assert run.data.interactions.catalogue.item_ids[0] == "i999"
    scores = dict(changed.listed())
    shown = {title: score for title, score in listed if title in scores}
    assert len(shown) >= 7
    assert {title: scores[title] for title in shown} == pytest.approx(shown, abs=1e-4)
    with pytest.raises(CheckpointError, match="1 are new"):
        evaluate_run(changed.run)


def test_an_item_with_another_text_is_another_item(changed: Changed) -> None:
    changed.rewrite(changed.world.items, lambda rows: [[r[0], f"{r[1]} 2"] for r in rows])
    _, _, alignment = open_to_serve(changed.run)
    assert alignment.num_kept == 0
    with pytest.raises(CheckpointError, match="30 items have gone or have another text"):
        open_run(changed.run)


def test_without_an_exported_adapter_a_changed_run_serves_nobody(changed: Changed) -> None:
    shutil.rmtree(changed.run / "shared_adapter")
    changed.listed()
    changed.rewrite(changed.world.interactions, without_newest)
    with pytest.raises(CheckpointError, match="it has exported no adapter"):
        open_to_serve(changed.run)


@pytest.mark.parametrize("open_it", [open_run, open_to_serve])
def test_another_base_model_is_refused(open_it: Callable[[Path], object], changed: Changed) -> None:
    path = changed.world.model / "model.safetensors"
    tensors = load_file(path)
    save_file({name: 1.5 * value for name, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights of .*model have changed"):
        open_it(changed.run)


@pytest.mark.parametrize("open_it", [open_run, open_to_serve])
def test_another_prompt_is_refused(open_it: Callable[[Path], object], changed: Changed) -> None:
    path = changed.folder / "next_item.v1.toml"
    path.write_text(path.read_text().replace('item = "', 'item = "* ', 1))
    with pytest.raises(CheckpointError, match=r"the prompt .* is another one"):
        open_it(changed.run)


def test_a_folder_put_together_from_two_runs_is_refused(changed: Changed, tmp_path: Path) -> None:
    other = run_experiment(
        changed.world.config(tmp_path, federation__num_rounds=2, adapters__shared__rank=3)
    )
    theirs, ours = RunFolders.of(other).server, RunFolders.of(changed.run).server
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(CheckpointError, match="are of two runs"):
        open_run(changed.run)


def test_a_run_that_does_not_say_what_it_stands_on_is_refused(changed: Changed) -> None:
    path = changed.run / TRAINED_ON_FILE
    tree = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps({"item_keys": []}), json.dumps(tree | {"more": 1})):
        path.write_text(damaged)
        with pytest.raises(CorruptFileError, match=TRAINED_ON_FILE):
            open_run(changed.run)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"trained_on\.json is missing"):
        open_run(changed.run)


def test_a_run_goes_on_with_items_in_another_order_and_not_with_other_interactions(
    changed: Changed,
) -> None:
    tensors = open_run(changed.run)[1].shared.tensors
    prompt = str(changed.folder / "next_item.v1.toml")
    config = changed.world.config(changed.folder / "runs", prompt=prompt, **SETTINGS)
    changed.rewrite(changed.world.items, lambda rows: sorted(rows, reverse=True))
    run_experiment(config, resume=True, from_round=4)
    again = open_run(changed.run)[1].shared.tensors
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    changed.rewrite(changed.world.interactions, without_newest)
    with pytest.raises(CheckpointError, match="the interactions have changed"):
        run_experiment(config, resume=True)
