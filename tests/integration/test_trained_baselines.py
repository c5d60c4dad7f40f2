"""The commands of SASRec and PFedRec, on the tiny world: a result file beside those of runs."""

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.baselines import (
    cli,
    esasrec,
    esasrec_model,
    pfedrec,
    pfedrec_training,
    sasrec,
    sasrec_training,
)
from pfm_llm.base.errors import ConfigError
from pfm_llm.cli.start import run_safely
from pfm_llm.config.schema import load_config
from pfm_llm.evaluation.results import read_results
from pfm_llm.evaluation.tables import results_table
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RESULTS_FILE
from pfm_llm.runs.run import load_corpus
from tests.support.tiny import Tiny

ROOT = Path(__file__).parents[2]
SCRIPTS = {"sasrec": sasrec, "esasrec": esasrec, "pfedrec": pfedrec}


@pytest.fixture(autouse=True)
def small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs, two rounds."""
    for module, changes in (
        (sasrec_training, {"dim": 8, "epochs": 2}),
        (esasrec_model, {"dim": 8, "epochs": 2}),
        (pfedrec_training, {"dim": 4, "rounds": 2, "lr_eta": 1.0}),
    ):
        grid: Any = module.GRID
        small = tuple(dataclasses.replace(setting, **changes) for setting in grid[:2])
        monkeypatch.setattr(module, "GRID", small)


def arguments(tiny: Tiny, tmp_path: Path, **changes: Any) -> argparse.Namespace:
    config = tiny.config_file(tmp_path / "tiny.yaml", tmp_path / "runs")
    values = {"config": str(config), "set": [], "seed": None, "grid": False, "openings": None}
    values["negatives"] = "honest"
    return argparse.Namespace(**{**values, "output": tmp_path / "out.json", **changes})


@pytest.mark.parametrize("split", ["leave_last_out", "last_fraction"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_results_stand_beside_those_of_a_run(
    name: str, split: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tiny, tmp_path, set=[f"data.split={split}"], seed=3)
    cli.run(given, SCRIPTS[name].trainer)
    assert name in capsys.readouterr().out
    rows, extra = read_results(given.output)
    assert {(row.method, row.mode, row.task, row.protocol) for row in rows} == {
        (name, "none", "next_item", split)
    }
    assert {row.seed for row in rows} == {3}
    assert {row.split for row in rows} == {"validation", "test"}
    assert {row.candidates for row in rows} == {"full", "sampled5"}
    assert {row.k for row in rows} == {5, 10}
    assert name in results_table(rows, "test")
    assert extra["config"]["data"]["split"] == split
    assert extra["environment"]["seed"] == 3
    assert extra["test_openings"]["methods"][name] == {
        "times": 1,
        "times_with_these_settings": 1,
    }
    assert len(extra["validation_history"]) == 2
    assert extra["costs"]["training_seconds"] > 0


def test_a_run_is_compared_with_a_baseline_that_was_trained_apart(
    tiny: Tiny, tmp_path: Path
) -> None:
    given = arguments(tiny, tmp_path)
    cli.run(given, sasrec.trainer)
    run = run_experiment(tiny.config(tmp_path / "runs", federation__num_rounds=2))
    evaluate_run(run, [given.output])
    rows, extra = read_results(run / RESULTS_FILE)
    theirs, _ = read_results(given.output)
    values = {
        (row.split, row.mode): row.value
        for row in (*rows, *theirs)
        if (row.candidates, row.metric, row.k) == ("full", "ndcg", 10)
        and row.method in ("sasrec", "custom")
    }
    found = [one for one in extra["comparisons"] if one["metric"] == "ndcg_over_sasrec"]
    assert found
    for one in found:
        expected = values[one["split"], one["mode"]] - values[one["split"], "none"]
        assert one["value"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", SCRIPTS)
def test_values_per_user_average_to_the_rows(name: str, tiny: Tiny, tmp_path: Path) -> None:
    given = arguments(tiny, tmp_path, set=["data.split=last_fraction"])
    cli.run(given, SCRIPTS[name].trainer)
    rows, extra = read_results(given.output)
    split = load_corpus(load_config(given.config, given.set)).split
    assert max(len(targets) for targets in split.test.targets) > 1
    for held_out in (split.validation, split.test):
        own = extra["per_user"][held_out.name]
        assert own["users"] == held_out.users.tolist()
        [row] = [
            row
            for row in rows
            if (row.split, row.candidates, row.metric, row.k) == (held_out.name, "full", "ndcg", 10)
        ]
        assert math.fsum(own["ndcg@10"]) / len(own["ndcg@10"]) == pytest.approx(row.value)
        assert row.num_users == len(own["users"]) == len(own["log_rank"])
        assert all(0 <= value <= math.log(30) for value in own["log_rank"])
    values = {row.value for row in rows if row.split == "validation" and row.metric == "ndcg"}
    assert max(entry["ndcg@10"] for entry in extra["validation_history"]) in values


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_grid_is_chosen_from(name: str, tiny: Tiny, tmp_path: Path) -> None:
    given = arguments(tiny, tmp_path, grid=True)
    cli.run(given, SCRIPTS[name].trainer)
    _, extra = read_results(given.output)
    history = extra["validation_history"]
    assert len(history) == 4
    best = max(history, key=lambda entry: entry["ndcg@10"])
    assert extra["settings"].items() <= {"negatives": "honest", **best}.items()


def test_equal_seeds_give_equal_results(tiny: Tiny, tmp_path: Path) -> None:
    for script in SCRIPTS.values():
        contents = []
        for _ in range(2):
            given = arguments(tiny, tmp_path)
            cli.run(given, script.trainer)
            content = json.loads(given.output.read_text())
            counted = ("costs", "test_openings")
            contents.append({k: v for k, v in content.items() if k not in counted})
        assert contents[0] == contents[1]


def test_published_negatives_are_named_as_leaking(tiny: Tiny, tmp_path: Path) -> None:
    given = arguments(tiny, tmp_path, negatives="published")
    cli.run(given, pfedrec.trainer)
    rows, extra = read_results(given.output)
    assert {row.method for row in rows} == {"pfedrec_published_leaking"}
    assert extra["settings"]["negatives"] == "published"


def test_a_wrong_setting_is_one_message(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tiny, tmp_path, set=["data.splitt=x"])
    with pytest.raises(ConfigError):
        cli.run(given, sasrec.trainer)
    with pytest.raises(SystemExit):
        run_safely(functools.partial(cli.run, given, sasrec.trainer))
    assert "data.splitt" in capsys.readouterr().err
    assert not given.output.exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_comes_without_torch_from_any_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, str(ROOT / f"benchmarks/baselines/{name}.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--grid" in result.stdout
