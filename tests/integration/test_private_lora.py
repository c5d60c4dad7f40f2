"""A user's own LoRA, read off their history in a federated run, and exported for them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pfm_llm.cli.main import make_app
from pfm_llm.client import private_steps
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.settings import with_setting
from pfm_llm.evaluation.evaluator import combine
from pfm_llm.evaluation.results import FULL
from pfm_llm.model.lora import OUTPUT_FILE
from pfm_llm.model.private.hyper_lora import LORA, OUTPUT, OUTPUT_OWN
from pfm_llm.model.private.taste import READ_OUT
from pfm_llm.protocol.types import Mode
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RESULTS_FILE, RunFolders
from pfm_llm.runs.measuring import evaluation_task, measure, quality_of
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.run import make_trainer
from tests.support.tiny import Tiny


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("private_lora")
    return run_experiment(tiny.config(output, method="pfm"))


def _recommend(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(make_app(), ["recommend", *map(str, arguments)])
    return found.exit_code, found.output + str(found.exception or "")


def test_a_users_lora_follows_from_history_and_shared_state_alone(
    run: Path, tmp_path: Path
) -> None:
    """Its owner's exported folder has the shared factors, scaled by what the client keeps."""
    opened, trained = open_run(run)
    user = opened.data.interactions.user_ids[0]
    private = PrivateStore(RunFolders.of(run).private).load_personalised(f"user-{user}")
    assert private is not None
    folder = tmp_path / "mine"
    code, output = _recommend("--run", run, "--user", user, "--export-private", folder)
    assert code == 0, output
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == opened.config.adapters.private.rank
    written = load_file(folder / "adapter_model.safetensors")
    shared, scale = trained.shared.tensors, opened.config.adapters.private.scale
    scale *= trained.private_weight
    modules = settings["target_modules"]
    assert len(written) == 2 * len(modules) >= 8
    for module in modules:
        own = private.tensors[f"private.hyper_lora.{module}"]
        a, b = (written[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        assert own.any()
        assert torch.equal(a, shared[f"{LORA}.{module}.A"])
        torch.testing.assert_close(b, shared[f"{LORA}.{module}.B"] * own * scale)
    output, weight = load_file(folder / OUTPUT_FILE), trained.private_weight
    assert torch.equal(output["lora_A.weight"], shared[OUTPUT])
    of_scores = shared[READ_OUT] * private.tensors[OUTPUT_OWN] * weight
    torch.testing.assert_close(output["lora_B.weight"], of_scores)
    torch.testing.assert_close(output["lora_B.bias"], of_scores.sum(1))


def test_a_user_keeps_and_exports_the_lora_after_the_private_steps(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_steps, "RATE", 1e4)  # four rounds leave a LoRA of small factors
    run = run_experiment(
        tiny.config(
            tmp_path,
            method="pfm",
            adapters__private__steps=4,
            evaluation__splits=["validation"],
        )
    )
    opened, trained = open_run(run)
    store, histories = opened.clients.store, opened.clients.histories
    chunk = list(histories.clients)
    without = make_trainer(
        with_setting(opened.config, "adapters.private.steps", 0), opened.model, histories, store
    )
    read = without.fit(chunk, trained.shared, [None] * len(chunk))
    lora = [name for name in read if name.startswith("private.hyper_lora.")]
    kept = {c: state.tensors for c in chunk if (state := store.load_personalised(c)) is not None}
    stepped = [
        any(not torch.allclose(kept[client_id][name], read[name][c], atol=1e-7) for name in lora)
        for c, client_id in enumerate(chunk)
    ]
    assert len(chunk) > sum(stepped) > 0
    client_id = chunk[stepped.index(True)]
    model = Recommender.of_run(opened, trained, client_id.removeprefix("user-"))
    model.export_private(tmp_path / "mine")
    written = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    scale = opened.config.adapters.private.scale * trained.private_weight
    for name in set(lora) - {OUTPUT_OWN}:
        module = name.removeprefix("private.hyper_lora.")
        b = trained.shared.tensors[f"{LORA}.{module}.B"] * kept[client_id][name] * scale
        torch.testing.assert_close(written[f"base_model.model.{module}.lora_B.weight"], b)
    of_scores = load_file(tmp_path / "mine" / OUTPUT_FILE)["lora_B.weight"]
    own = kept[client_id][OUTPUT_OWN] * trained.private_weight
    torch.testing.assert_close(of_scores, trained.shared.tensors[READ_OUT] * own)
    # One who personalises the adapter at home takes the same steps.
    items = opened.data.interactions.catalogue.item_ids
    history = [items[i] for i in histories.history(client_id).items]
    for steps, expected in ((None, kept[client_id]), (0, _row(read, chunk.index(client_id)))):
        found = model.personalise(history, tmp_path / "private", steps=steps).tensors
        for name in lora:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)


def _row(stacked: Mapping[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: value[row] for name, value in stacked.items()}


def test_the_lora_alone_changes_what_its_owner_is_shown(run: Path) -> None:
    opened, _ = open_run(run)
    model = Recommender.from_pretrained(run, opened.data.interactions.user_ids[0])
    assert model.owner is not None
    private = model.owner.private
    assert private is not None
    kept = {
        name: torch.zeros_like(value) if name.startswith("private.taste") else value
        for name, value in private.tensors.items()
    }
    with_lora = model.score(private=dataclasses.replace(private, tensors=kept))
    without = model.score(private_weight=0.0)
    assert abs(with_lora - without).max() > 0


def test_an_empty_history_has_no_lora(run: Path, tmp_path: Path) -> None:
    opened, _ = open_run(run)
    model = Recommender.from_pretrained(run, opened.data.interactions.user_ids[0])
    first = opened.data.interactions.catalogue.item_ids[0]
    state = model.personalise([first], tmp_path / "private")
    assert any(value.any() for name, value in state.tensors.items() if "hyper_lora" in name)
    initial = opened.model.private.initial("user-me")
    assert initial.keys() == state.tensors.keys()
    assert not any(value.any() for value in initial.values())


def test_a_run_reports_each_piece_of_its_private_part(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """With the shared part and without the other piece."""
    results = json.loads((run / RESULTS_FILE).read_text())["rows"]
    reported = {
        row["mode"]: row["value"]
        for row in results
        if (row["split"], row["metric"], row["k"]) == ("test", "ndcg", 10)
        and row["candidates"] == FULL
    }
    opened, trained = open_run(run)
    task = evaluation_task(
        opened, trained, opened.data.split.test, [Mode.SHARED_PRIVATE], keep=True
    )
    measure(opened, task)
    store = opened.clients.store
    for piece, other in (("lora", "taste"), ("embedding", "hyper_lora")):
        measured = []
        for user in task.held_out.users:
            client = f"user-{opened.data.interactions.user_ids[user]}"
            whole = store.load_personalised(client)
            assert whole is not None
            left = {n: v for n, v in whole.tensors.items() if f"private.{other}." not in n}
            assert len(left) < len(whole.tensors)
            stacked = {n: v[None] for n, v in left.items()}
            measured.append(opened.evaluator.rank_chunk((client,), task, stacked))
        quality = quality_of(combine(measured), Mode.SHARED_PRIVATE, "ndcg", 10)
        assert reported[f"shared_{piece}"] == pytest.approx(quality.mean(), abs=1e-9)
    alone = run_experiment(tiny.config(tmp_path, method="pfm_embedding"))
    modes = {row["mode"] for row in json.loads((alone / RESULTS_FILE).read_text())["rows"]}
    assert modes >= {"shared_private"}
    assert not modes & {"shared_lora", "shared_embedding"}


def test_what_has_no_lora_says_so(tiny: Tiny, tmp_path: Path) -> None:
    run = run_experiment(tiny.config(tmp_path / "runs", method="pfm_embedding"))
    user = open_run(run)[0].data.interactions.user_ids[0]
    code, output = _recommend("--run", run, "--user", user, "--export-private", tmp_path / "mine")
    assert code != 0
    assert "no LoRA on the layers" in output
    assert "method: pfm," in output
    code, output = _recommend("--run", run, "--compare", "--export-private", tmp_path / "mine")
    assert code != 0
    assert "--user" in output
    assert not (tmp_path / "mine").exists()
