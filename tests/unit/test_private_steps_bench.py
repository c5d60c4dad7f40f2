"""The benchmark of private steps, on a tiny run: what it writes is the difference it names."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import private_steps
from pfm_llm.base import files
from pfm_llm.client import private_steps as taken
from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny

SETTINGS: dict[str, Any] = {
    "evaluation__splits": ["validation"],
    "evaluation__private_weights": [],  # counts fully
    "federation__num_rounds": 4,
}


def test_the_steps_are_compared_with_what_was_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_experiment(tiny.config(tmp_path, method="pfm", **SETTINGS))
    found = []
    for rate in (1e-9, 1e6):  # so few rounds leave a LoRA of small factors
        monkeypatch.setattr(taken, "RATE", rate)
        monkeypatch.setattr(taken, "LEAST_EVENTS", 4)
        out = tmp_path / "steps.json"
        private_steps.run(argparse.Namespace(run=run, steps=4, split="test", out=out))
        result = files.read_json(out)
        assert result["config"]["adapters"]["private"]["steps"] == 4
        found.append({row["metric"]: row["value"] for row in result["rows"]})
    assert found[0] == {"steps_over_read_log_rank": 0, "steps_over_read_ndcg": 0}
    assert found[1]["steps_over_read_log_rank"] != 0
    assert "steps_over_read_log_rank" in capsys.readouterr().out
