"""What a run leaves: every file as promised, and loadable without us."""

import importlib.metadata
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

from examples.plain_peft import user_state
from pfm_llm.base import files
from pfm_llm.base.errors import ConfigError
from pfm_llm.base.terminal import columns
from pfm_llm.cli.evaluate import print_ending
from pfm_llm.config.schema import load_config, training_hash
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.head import context_vectors, score_items, user_vectors
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.runs import summary
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.lists import LISTS_FILE, MARK, read_lists
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.run import load_corpus
from tests.support.leaks import files_below
from tests.support.scripts import run_script
from tests.support.tiny import Tiny, leftovers, metrics_of, results_of

MODES = ("zero_shot", "shared_only", "private_only", "shared_private")
BASELINES = ("popularity", "ease", "markov_recency")
ROW_KEYS = [
    *("method", "mode", "task", "protocol", "budget", "split", "candidates", "metric", "k"),
    *("value", "ci_low", "ci_high", "num_users", "seed", "regime"),
]


def test_every_promised_file_is_there_and_no_other(finished: Path) -> None:
    assert set(files_below(finished)) == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "results.md",
        "plots/loss.png",
        "plots/ndcg_by_round.png",
        "plots/user_gain.png",
        "trained_on.json",
        "shared_adapter/README.md",
        "shared_adapter/adapter_config.json",
        "shared_adapter/adapter_model.safetensors",
        "shared_adapter/item_keys.json",
        "shared_adapter/pfm_manifest.json",
        "shared_adapter/plots/loss.png",
        "shared_adapter/plots/ndcg_by_round.png",
        "shared_adapter/plots/user_gain.png",
        "shared_adapter/prompts/next_item.v2.toml",
        "shared_adapter/recommender_head.safetensors",
        "shared_adapter/training_config.yaml",
    }
    private = finished.with_name("tiny.private")
    assert {path.name for path in private.iterdir()} == {
        *("clients", "lists.json", "run.lock", "server")
    }
    assert set(files_below(private / "server")) == {
        *("commit.json", "round_000002.safetensors", "round_000004.safetensors")
    }
    assert leftovers(finished) == []
    beside = {path.name for path in finished.parent.iterdir()}
    assert beside == {"tiny", "tiny.private", "test_openings.json", "test_openings.lock"}


def test_config_is_the_resolved_one(finished: Path, tiny: Tiny) -> None:
    config = load_config(finished / "config.yaml")
    asked = tiny.config(finished.parent, federation__server__lr_lora=0.02)
    assert training_hash(config) == training_hash(asked)
    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["federation"]["server"]["momentum"] == 0.9  # a default, spelt out
    assert results_of(finished)["config"] == config.model_dump(mode="json")


def test_environment_says_what_ran_where(finished: Path) -> None:
    environment = files.read_json(finished / "environment.json")
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert environment["versions"].keys() >= {"python", "pfm_llm", "transformers", "peft"}
    wanted = {"seed": 0, "dtype": "float32", "threads": 1, "num_processes": 1, "device": "cpu"}
    assert environment.items() >= wanted.items()
    assert environment["data"]["num_users"] == 24
    assert "leave_last_out" in environment["split"]


def test_metrics_have_a_line_for_each_round(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert [record["round"] for record in metrics] == [1, 2, 3, 4]
    for record in metrics:
        assert record["num_clients"] == 4
        assert record["refused"] == 0
        assert record["bytes_up"] == record["bytes_down"] > 0
        assert np.isfinite(record["loss"])
    # Every second round, but for the last: that one is in the results.
    assert [set(record.get("validation", ())) for record in metrics] == [
        set(),
        {"shared_only", "shared_private"},
        set(),
        set(),
    ]


def test_results_hold_a_row_for_every_method_split_candidates_metric_and_k(finished: Path) -> None:
    rows = results_of(finished)["rows"]
    methods = [*((name, "none") for name in BASELINES), *(("custom", mode) for mode in MODES)]
    splits, candidates = ("validation", "test"), ("full", "sampled5")
    wanted = itertools.product(methods, splits, candidates, ("ndcg", "hit_rate", "mrr"), (5, 10))
    found = [
        ((r["method"], r["mode"]), r["split"], r["candidates"], r["metric"], r["k"]) for r in rows
    ]
    assert sorted(found) == sorted(wanted)


def test_rows_have_the_promised_keys_and_values(finished: Path) -> None:
    for row in results_of(finished)["rows"]:
        assert list(row) == ROW_KEYS
        assert (row["task"], row["protocol"]) == ("next_item", "leave_last_out")
        assert (row["num_users"], row["seed"]) == (24, 0)
        assert 0 <= row["ci_low"] <= row["ci_high"] <= 1
        assert 0 <= row["value"] <= 1
        if row["mode"] != "none":
            trained = row["mode"] != "zero_shot"
            assert row["budget"] == ("4 rounds x 4 clients" if trained else "no training")
        else:
            assert row["budget"] == "pooled data"


def test_costs_are_counted(finished: Path) -> None:
    content = results_of(finished)
    costs = content["costs"]
    assert costs["rounds"] == 4
    assert costs["client_rounds"] == 4 * 4
    assert costs["shared_client_steps"] == costs["private_client_steps"] == 16
    assert costs["personalise_client_steps"] == 24 * 2  # 24 clients, 2 steps each
    assert costs["share_of_users_with_private_adapter"] == 1.0
    assert costs["bytes_up"] == 16 * 4 * costs["shared_numbers"]
    assert set(content["baselines"]) == set(BASELINES)


def test_table_shows_the_rows(finished: Path) -> None:
    table = (finished / "results.md").read_text()
    assert all(f"| {name} |" in table for name in (*MODES, *BASELINES))
    row = next(
        row
        for row in results_of(finished)["rows"]
        if (row["mode"], row["split"], row["candidates"], row["metric"], row["k"])
        == ("shared_private", "test", "full", "ndcg", 10)
    )
    assert f"{row['value']:.4f}" in table


@pytest.mark.parametrize("name", ["loss", "ndcg_by_round", "user_gain"])
def test_plots_are_pictures(name: str, finished: Path) -> None:
    path = finished / "plots" / f"{name}.png"
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 10  # more than an empty sheet


# --- the shared adapter, without us -----------------------------------------------------------


def test_adapter_folder_is_a_plain_peft_folder_of_the_shared_adapter(finished: Path) -> None:
    folder = finished / "shared_adapter"
    config = files.read_json(folder / "adapter_config.json")
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["modules_to_save"] is None
    tensors = files.read_tensors(folder / "adapter_model.safetensors")[0]
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert all(bool(tensor.any()) for tensor in tensors.values())
    text = b"".join(files_below(folder).values()).decode(errors="replace")
    assert str(finished.parent.parent) not in text  # no path of this machine


def test_manifest_identifies_all_parts(finished: Path) -> None:
    folder = finished / "shared_adapter"
    manifest = files.read_json(folder / "pfm_manifest.json")
    assert manifest["round"] == 4
    # Everything in the folder but the manifest itself and the card, which may be edited.
    listed = set(files_below(folder)) - {"pfm_manifest.json", "README.md"}
    assert manifest["files"] == {name: files.sha256_of(folder / name) for name in listed}
    assert manifest["num_items"] == 30
    assert all(len(manifest["base"][key]) == 64 for key in ("weights_sha256", "tokenizer_sha256"))


def plain_peft(run: Path, tiny: Tiny) -> Any:
    """As the model card says, with nothing of ours."""
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    return PeftModel.from_pretrained(base, run / "shared_adapter").eval()


def test_adapter_loads_by_plain_peft_to_equal_hidden_states(finished: Path, tiny: Tiny) -> None:
    opened, trained = open_run(finished)
    ours = opened.model.adapter.peft_model().eval()
    opened.model.adapter.load_shared(ours, trained.shared.tensors)
    encoder = opened.model.encoder
    tokens = torch.tensor([encoder.header_tokens + encoder.catalogue_pieces()[0]])
    plain = plain_peft(finished, tiny)
    with torch.no_grad():
        theirs = plain(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        # The private adapter of `ours` is as it was drawn: B is zero.
        expected = ours(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        with plain.disable_adapter():
            base = plain(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(theirs, expected, atol=1e-6)
    assert (theirs - base).abs().max() > 1e-5


def test_folder_by_itself_gives_the_shared_only_scores(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, head__item_ids="output", federation__server__lr_lora=0.02)
    run = run_experiment(config)
    opened, trained = open_run(run)
    window = opened.model.encoder.query_window(opened.data.interactions.history_of(3))
    states = opened.clients.cache.states([window], "user-of-this-test")
    batch = collate([[window]], [states], last_only=True)
    stacked = opened.scorer.stack(trained.shared, {}, 1)
    ours = opened.model.model.scores(batch, stacked, Parts(shared_lora=True, private_weight=0.0))

    plain = plain_peft(run, tiny)
    head, (normaliser, _) = read_artefact(run / "shared_adapter").contents()
    with torch.no_grad():
        texts = opened.model.encoder.catalogue_texts()
        read = [texts[item].removesuffix("\n") for item in window.items]
        hidden = user_state(plain, opened.model.backbone.tokenizer, read, adapted=2)[None]
        items = torch.from_numpy(window.items).long()[None]
        context = context_vectors(head, items, opened.model.model.item_texts)
        assert context is not None
        vectors = user_vectors(
            head, normaliser(hidden), torch.tensor([len(window)]), None, context[:, -1]
        )
        theirs = score_items(head, vectors, opened.model.model.item_texts)
    assert torch.allclose(theirs, ours, atol=1e-5)


# --- the scripts ------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / "tiny"


def test_evaluate_rewrites_equal_results(
    copied: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results.json", "results.md", "plots/loss.png"):
        (copied / name).unlink()
    shutil.rmtree(copied / "shared_adapter")
    done = run_script("evaluate.py", "--run", copied, capsys=capsys)
    assert done.code == 0
    assert "shared_private" in done.out
    assert f"run folder: {copied}" in done.out
    assert results_of(copied)["rows"] == results_of(finished)["rows"]
    same = [name for name in files_below(finished) if name != "results.json"]
    assert {n: files_below(copied)[n] for n in same if not n.startswith("plots")} == {
        n: files_below(finished)[n] for n in same if not n.startswith("plots")
    }


def recommend(run: Path, user: str, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    done = run_script("recommend.py", "--run", run, "--user", user, *more, capsys=capsys)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize("user", ["u0", "u7", "u23"])
def test_recommend_prints_unseen_items_best_first(
    user: str, finished: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = json.loads(recommend(finished, user, capsys, "--json"))
    assert list(listed) == ["items"]
    items = listed["items"]
    assert [list(item) for item in items] == [["item_id", "title", "score"]] * len(items)
    scores = [item["score"] for item in items]
    assert scores == sorted(scores, reverse=True)
    corpus = load_corpus(tiny.config(finished.parent))
    catalogue = corpus.interactions.catalogue
    history = corpus.interactions.history(corpus.interactions.user_ids.index(user))
    seen = {catalogue.item_ids[item] for item in history}
    assert len(items) == min(10, 30 - len(seen))
    assert not seen & {item["item_id"] for item in items}
    titles = dict(zip(catalogue.item_ids, catalogue.fields["title"], strict=True))
    assert all(item["title"] == titles[item["item_id"]] for item in items)


def test_recommend_shows_as_many_as_asked_and_as_text(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = json.loads(recommend(finished, "u0", capsys, "--json", "-n", "3"))["items"]
    text = recommend(finished, "u0", capsys, "-n", "3").splitlines()
    assert len(three) == len(text) == 3
    for line, item in zip(text, three, strict=True):
        assert item["title"] in line
        assert item["item_id"] in line


def test_lists_are_personal_and_use_the_private_adapter(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = recommend(copied, "u0", capsys, "--json")
    assert recommend(copied, "u1", capsys, "--json") != ours
    shutil.rmtree(copied.with_name("tiny.private") / "clients" / "user-u0")
    without = recommend(copied, "u0", capsys, "--json")
    assert without != ours
    assert len(json.loads(without)["items"]) == len(json.loads(ours)["items"])


@pytest.mark.parametrize("as_json", [True, False])
def test_recommend_for_an_unknown_user(
    as_json: bool, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", str(finished), "--user", "nobody", *(["--json"] if as_json else [])]
    done = run_script("recommend.py", *arguments, capsys=capsys)
    assert done.code == 2
    assert done.out == ""
    assert "error: no user 'nobody' in the data; users are u0" in done.err


def test_second_training_goes_to_a_folder_of_its_own_and_scripts_take_the_newest(
    copied: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(copied.parent)
    config = tiny.config_file(
        tmp_path / "config.yaml", copied.parent, federation__num_rounds=1, seed=5
    )
    done = run_script("fed_train.py", "--config", config, capsys=capsys)
    assert done.code == 0, done.err
    second = copied.with_name("tiny-2")
    assert f"run folder: {second}" in done.out
    assert load_config(second / "config.yaml").name == "tiny-2"
    assert (copied.with_name("tiny-2.private") / "clients").is_dir()
    after = files_below(copied.parent)
    del before["test_openings.json"]  # it counts the second one too
    assert {name: after[name] for name in before} == before

    newest = run_script(
        "recommend.py", "--runs", copied.parent, "--user", "u0", "--json", capsys=capsys
    )
    assert newest.out == recommend(second, "u0", capsys, "--json")
    assert newest.out != recommend(copied, "u0", capsys, "--json")
    # By its name the second run is gone on with, not by the first one's.
    resumed = run_script(
        "fed_train.py", "--config", config, "--set", "name=tiny-2", "--resume", capsys=capsys
    )
    assert resumed.code == 0, resumed.err
    assert not copied.with_name("tiny-3").exists()


def test_private_folders_hold_each_clients_own(finished: Path) -> None:
    clients = finished.with_name("tiny.private") / "clients"
    assert len(list(clients.iterdir())) == 24
    for client in clients.iterdir():
        kept = sorted(path.name for path in client.iterdir())
        assert "personalised.r000004.safetensors" in kept
        assert "trunk" not in kept  # states of items are no secret of a client
        trained = [name for name in kept if name.startswith("private.r")]
        assert len(trained) <= 3  # the newest at or before the older kept commit, and later ones
    assert len(list(clients.glob("*/private.r*"))) >= 4


def test_the_difference_to_each_baseline_is_paired_and_beside_the_rows(finished: Path) -> None:
    content = results_of(finished)
    found = [(row["split"], row["metric"], row["mode"]) for row in content["comparisons"]]
    assert found == [
        (split, f"ndcg_over_{name}", "shared_private")
        for split in ("validation", "test")
        for name in BASELINES
    ]
    values = {
        (r["split"], r["method"], r["mode"]): r["value"]
        for r in content["rows"]
        if (r["candidates"], r["metric"], r["k"]) == ("full", "ndcg", 10)
    }
    for row in content["comparisons"]:
        theirs = values[row["split"], row["metric"].removeprefix("ndcg_over_"), "none"]
        expected = values[row["split"], "custom", "shared_private"] - theirs
        assert row["value"] == pytest.approx(expected, abs=1e-12)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_the_gain_of_the_private_part_is_paired_and_beside_the_rows(finished: Path) -> None:
    content = results_of(finished)
    found = [(row["split"], row["metric"]) for row in content["gains"]]
    gains = ("gain_log_rank", "gain_ndcg")
    assert found == [(split, gain) for split in ("validation", "test") for gain in gains]
    values = {
        (r["split"], r["mode"]): r["value"]
        for r in content["rows"]
        if (r["candidates"], r["metric"], r["k"]) == ("full", "ndcg", 10)
    }
    for row in content["gains"]:
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        if row["metric"] == "gain_ndcg":
            of_split = [values[row["split"], mode] for mode in ("shared_private", "shared_only")]
            assert row["value"] == pytest.approx(of_split[0] - of_split[1], abs=1e-12)
    assert content["private_weight"] == 1.0
    table = (finished / "results.md").read_text()
    assert "| test | gain_ndcg |" in table
    assert "| test | ndcg_over_ease |" in table


def test_a_run_ends_with_what_it_found_and_with_lists_that_fill_one_screen(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(copied)
    print_ending(copied)
    *said, screen = capsys.readouterr().out.split("\nLists of three users; ")
    kept = read_lists(RunFolders.of(copied).private / LISTS_FILE)
    assert screen == "\n\n".join([MARK, *(one.text() for one in kept)]) + "\n"
    assert screen.count("\nUser u") == len(kept) == 3
    assert screen.count("\n") < 30
    assert max(map(columns, screen.splitlines())) <= 100
    lines = said[0].splitlines()
    found = summary.of_run(copied, results_of(copied))
    assert lines[-2 - len(found) : -2] == found
    assert [line for line in lines if "the private part adds" in line]
    for name in BASELINES:
        assert [line for line in lines if f"than {name}:" in line or f"from {name}:" in line]
    assert found[-2].endswith(f"pfm recommend --run {copied} --user ID --compare")


def test_a_run_that_is_not_there_is_answered_with_those_that_are(copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run at .*tiny-typo; .* has tiny"):
        evaluate_run(copied.with_name("tiny-typo"))
