"""What measuring a run shows of its progress."""

import logging
from pathlib import Path

import pytest

from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import NUM_USERS, Tiny


def test_an_evaluation_counts_the_users_of_silos(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"data__users_per_client": 5, "federation__num_rounds": 1}
    run_experiment(tiny.config(tmp_path / "runs", **settings))
    (line,) = [m for m in caplog.messages if m.startswith("evaluating on test")]
    assert f"{NUM_USERS}/{NUM_USERS}" in line
    assert "users/s" in line
