"""Items that share vectors: a run, its published folder, and other catalogues."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pfm_llm.base.errors import ArtefactError, CheckpointError, DataError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.cli.main import main
from pfm_llm.model.items import codes as item_codes
from pfm_llm.protocol.types import Mode
from pfm_llm.publish.artefact import HEAD_FILE, ITEM_KEYS_FILE, read_artefact
from pfm_llm.publish.staging import stage
from pfm_llm.publish.versions.difference import diff_versions
from pfm_llm.recommender import Recommender
from pfm_llm.runs.checks.memory import estimate_memory
from pfm_llm.runs.checks.process import shape_of
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.measuring import evaluation_task, only
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.study.cold_start import known_by_none
from tests.support.tiny import TITLES, Tiny, metrics_of, tensor_files

BOOKS = {"text_books": 1, "text_size": 5, "hash_books": 2, "hash_size": 16, "met_size": 64}
SETTINGS: dict[str, Any] = {
    "method": "pfm",
    "tasks": ["next_item"],
    "head__item_ids": "codes",
    "head__codes": BOOKS,
    "federation__num_rounds": 4,
    "federation__transport": "bfloat16",
    "federation__server__lr_item_ids": 0.05,
    "evaluation__baselines": [],
}
HISTORY = ["i3", "i4", "i6"]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny.config(tmp_path_factory.mktemp("codes"), **SETTINGS))


def pulled(run: Path, tiny: Tiny, items: Path | None = None) -> Recommender:
    return Recommender.from_pretrained(
        run / "shared_adapter", catalogue=str(items or tiny.items), backbone=str(tiny.model)
    )


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    run: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config_file(tmp_path / "c.yaml", tmp_path / "runs", **SETTINGS)
    append = MetricsLog.append

    def stops(self: MetricsLog, record: Any) -> None:
        append(self, record)
        if record["round"] == 3:  # rounds 2 and 4 are committed
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["pfm", "--config", str(config)])
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", stops)
        with pytest.raises(SystemExit) as stopped:
            main("train")
    assert stopped.value.code
    with pytest.raises(SystemExit) as ended:
        main("train", "--resume")
    assert not ended.value.code
    whole, found = tensor_files(run), tensor_files(tmp_path / "runs" / "tiny")
    assert whole
    assert whole == found


def test_the_cost_of_a_round_is_that_of_what_is_sent(run: Path) -> None:
    opened, _ = open_run(run)
    table = opened.model.table
    assert all(one["bytes_up"] == 4 * table.num_bytes for one in metrics_of(run))
    assert table.held_bytes == 2 * table.num_bytes
    assert not table.per_item
    assert table["head.item_ids"].shape[0] == table["head.item_bias"].shape[0] == 5 + 2 * 16
    assert table["head.item_met"].shape == (3 * 64,)


def test_memory_counts_the_rows_of_items_that_are_summed_up(run: Path) -> None:
    opened, _ = open_run(run)
    shape = shape_of(opened.config, opened.data)
    # An ID embedding of 4 numbers, a bias, and two embeddings of the user's features of 128 each.
    assert shape.of_codes == 4 + 1 + 2 * 128
    assert shape.table == opened.model.table.held_bytes
    many = dataclasses.replace(shape, num_items=10**7)
    alone = dataclasses.replace(many, of_codes=0)
    more = estimate_memory(many).total - estimate_memory(alone).total
    assert more == 2 * 4 * 10**7 * shape.of_codes * 4  # a cohort of 4, each with gradients


def test_an_adapter_serves_as_its_run_does(run: Path, tiny: Tiny) -> None:
    own = Recommender.from_pretrained(run).score(HISTORY)
    assert np.ptp(own) > 0.1
    np.testing.assert_allclose(pulled(run, tiny).score(HISTORY), own, atol=1e-5)


def test_the_plain_files_give_the_bias_of_every_item(run: Path) -> None:
    folder = run / "shared_adapter"
    tensors = load_file(folder / HEAD_FILE)
    opened, trained = open_run(run)
    parts = opened.model
    assert parts.codes is not None
    keys = json.loads((folder / ITEM_KEYS_FILE).read_text())
    texts = parts.model.item_texts.double()
    distances = torch.cdist(texts, tensors["codes.centroids"][0].double())
    expected = []
    for key, nearest in zip(keys, distances.argmin(1).tolist(), strict=True):
        digest = hashlib.shake_256(f"codes/{key}".encode()).digest(8 * 5)
        numbers = [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(5)]
        bias = tensors["head.item_bias"]
        value = float(bias[nearest])
        if all(tensors["head.item_met"][n % 64 + 64 * k] > 0 for k, n in enumerate(numbers[2:])):
            value += sum(float(bias[5 + 16 * k + n % 16]) for k, n in enumerate(numbers[:2]))
        expected.append(value)
    found = parts.codes.expanded(dict(trained.shared.tensors))["head.item_bias"]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 6) for value in expected}) > 20


def test_items_of_another_catalogue_keep_what_was_learned_for_them(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """The other catalogue has fewer items, in another order, one of them with another text."""
    kept = [6, 3, 4, 20, 11]
    lines = ["item_id,title", *(f"i{item},{TITLES[item]}" for item in kept), "i9,violet moon"]
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    there, here = pulled(run, tiny, tmp_path / "items.csv"), pulled(run, tiny)
    np.testing.assert_allclose(
        there.score(HISTORY)[: len(kept)], here.score(HISTORY)[kept], atol=1e-5
    )
    codes, own = there.parts.codes, here.parts.codes
    assert codes is not None
    assert own is not None
    assert torch.equal(codes.columns[:5], own.columns[kept])
    # Item 9 has another text, so another key: nothing of what was learned for its id is left.
    assert not torch.equal(codes.columns[5, 1:], own.columns[9, 1:])


def test_a_user_of_whom_nothing_is_known_is_ranked_by_the_summed_up_biases(run: Path) -> None:
    opened, trained = open_run(run)
    modes = (Mode.SHARED_ONLY,)
    task = only(evaluation_task(opened, trained, opened.data.split.test, modes), *modes)
    codes = opened.model.codes
    assert codes is not None
    bias = codes.expanded(dict(trained.shared.tensors))["head.item_bias"]
    targets = task.held_out.targets
    # A target counts after the items of equal bias.
    of_first = [int((bias >= bias[own[0]]).sum()) for own in targets]
    assert known_by_none(opened, task) == pytest.approx(-np.log(of_first))


def test_a_push_checks_the_centroids_as_it_does_all_tensors(run: Path, tmp_path: Path) -> None:
    staged = stage(run / "shared_adapter", tmp_path / "staged", None)
    centroids = staged.code_centroids()
    assert centroids is not None
    assert centroids.shape == (1, 5, 8)
    difference = diff_versions(staged, read_artefact(run / "shared_adapter"))
    assert {change.norm for change in difference.tensors} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head__codes": {**BOOKS, "hash_books": 1, "hash_size": 32}}, "trained with head.codes:"),
        ({"head__codes": {**BOOKS, "met_size": 65}}, r"head\.item_met is \[192\] there"),
        ({"head__item_ids": "both", "head__codes": None}, r"head\.item_bias is \[37\] there"),
    ],
)
def test_a_start_from_other_codes_is_refused(
    run: Path, tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    start = {"init_from": {"adapter": str(run / "shared_adapter")}, "name": "second"}
    with pytest.raises(ArtefactError, match=message):
        run_experiment(tiny.config(tmp_path, **{**SETTINGS, **change}, **start))


def test_training_goes_on_from_an_adapter_with_its_codes(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    start = {"init_from": {"adapter": str(run / "shared_adapter")}, "name": "second"}
    second = run_experiment(tiny.config(tmp_path, **SETTINGS, **start, seed=5))
    first, again = (open_run(folder)[0].model.codes for folder in (run, second))
    assert first is not None
    assert again is not None
    assert first.identity() == again.identity()


def test_more_text_vectors_than_items_are_refused_before_training(
    tiny: Tiny, tmp_path: Path
) -> None:
    books = {**BOOKS, "text_size": 31}
    with pytest.raises(DataError, match=r"text_size: 31 exceeds the 30 different texts"):
        run_experiment(tiny.config(tmp_path, **{**SETTINGS, "head__codes": books}))


def test_codes_that_come_out_otherwise_are_noticed_when_a_run_is_opened(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_codes, "_STEPS", 0)
    with pytest.raises(CheckpointError, match="codes of its items come out otherwise"):
        open_run(run)
