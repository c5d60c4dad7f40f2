"""A suite of two runs on the tiny model, for real: interrupted, gone on with, and reported."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.evaluation.results import ResultRow, read_results
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RESULTS_FILE
from pfm_llm.suite.plan import Plan, make_plan
from pfm_llm.suite.report.page import write_report
from pfm_llm.suite.running import Tools, run_suite
from pfm_llm.suite.status import State, status_of
from tests.support.scripts import SCRIPTS, run_script
from tests.support.tiny import Tiny

SUITE: dict[str, Any] = {
    "name": "films",
    "base": "base.yaml",
    "budgets": {"small": {"set": {"federation.num_rounds": 3}}},
    "grids": {"lr": {"key": "federation.server.lr_lora", "values": [0.001, 0.1]}},
    "runs": [
        {"name": "shared", "set": {"adapters.private.enabled": False}},
        {"name": "pfm", "grid": "lr"},
    ],
}


@pytest.fixture
def suite(tiny: Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "films.yaml"
    tiny.config_file(tmp_path / "base.yaml", tmp_path / "runs", output__checkpoint_every=1)
    path.write_text(yaml.safe_dump(SUITE))
    return path


def final(run: Path, budget: str, openings: Path) -> Sequence[ResultRow]:
    """Stands for the study: the same run's validation rows, as if they were of test."""
    rows, _ = read_results(run / RESULTS_FILE)
    return [ResultRow(**vars(row) | {"split": "test"}) for row in rows]


def figures(plan: Plan, results: Path) -> dict[str, Any]:
    """What must be equal however often it was interrupted."""
    found = {}
    for run in plan.runs:
        rows, extra = read_results(plan.result(run, results))
        found[run.label] = rows, extra["grid"], extra["training_hash"]
    return found


def test_a_suite_interrupted_in_training_ends_as_one_that_was_not(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(suite, "small")
    results, tools = tmp_path / "results", Tools(run_experiment, final)
    append, rounds = MetricsLog.append, 0

    def interrupt(log: MetricsLog, record: Any) -> None:
        nonlocal rounds
        append(log, record)
        rounds += 1
        if rounds == 5:  # in the second round of the second experiment
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_suite(plan, results, tools)
    states = [status_of(plan, run, results).state for run in plan.runs]
    assert states == [State.DONE, State.BEGUN]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", interrupt)
        assert run_suite(plan, results, tools) == {}
    assert rounds == 3 * 3 + 1  # the interrupted round alone was run twice

    tree = SUITE | {"set": {"output.dir": str(tmp_path / "again")}}
    suite.write_text(yaml.safe_dump(tree))
    again = make_plan(suite, "small")
    assert run_suite(again, tmp_path / "results_again", tools) == {}
    assert figures(plan, results) == figures(again, tmp_path / "results_again")

    chosen = read_results(plan.result(plan.runs[1], results))[1]["grid"]["chosen"]
    kept = {path.name for path in (tmp_path / "runs" / "films-small").iterdir() if path.is_dir()}
    assert kept == {
        "shared-s0", "shared-s0.private", f"pfm-s0-{chosen}", f"pfm-s0-{chosen}.private",
    }  # fmt: skip
    page = write_report(results / "films" / "small")
    assert page.read_text().count("data:image/png") == 1


def test_the_list_needs_no_torch_and_trains_nothing(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise SystemExit('torch was imported')")
    listed = subprocess.run(
        [sys.executable, SCRIPTS / "benchmark.py", "--suite", suite, "--list", "--only", "pfm"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{SCRIPTS.parent}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines() == [
        "pfm-s0  missing  2 to train",
        "films, budget small: 1 missing",
    ]
    assert not (tmp_path / "runs").exists()


def test_the_script_ends_with_an_error_when_a_run_failed(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Tools, "real", classmethod(lambda cls: Tools(run_experiment, final)))
    broken = {"name": "broken", "set": {"data.source": str(tmp_path / "nowhere.csv")}}
    suite.write_text(yaml.safe_dump(SUITE | {"runs": [broken, SUITE["runs"][0]]}))
    results = tmp_path / "results"
    outcome = run_script("benchmark.py", "--suite", suite, "--results", results, capsys=capsys)
    assert outcome.code == 2
    assert "error: broken-s0: " in outcome.err
    assert "nowhere.csv" in outcome.err
    assert "broken-s0  failed" in outcome.out
    assert "shared-s0  done" in outcome.out
    assert (results / "films" / "small" / "report.html").is_file()


def test_an_interrupted_script_says_how_to_go_on(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*arguments: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tools, "real", classmethod(lambda cls: Tools(stop, final)))
    outcome = run_script(
        "benchmark.py", "--suite", suite, "--results", tmp_path / "results", capsys=capsys
    )
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err
