"""The benchmark of a host's passes, on a tiny run: what is raced does the same work."""

import argparse
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import agent_batch, mixed_batch
from pfm_llm.base import files
from pfm_llm.base.errors import TrainingError
from pfm_llm.base.processes import Processes
from pfm_llm.data.history import History
from pfm_llm.protocol.types import Tensors
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from tests.support.agents import tiny_recommender
from tests.support.tiny import Tiny


@pytest.fixture(scope="module")
def model(
    tiny: Tiny, one_process: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Recommender:
    return tiny_recommender(tiny, one_process, tmp_path_factory.mktemp("run"))


def _histories(count: int) -> list[History]:
    generator = np.random.default_rng(0)
    return [History(generator.choice(30, 3 + n, replace=False)) for n in range(count)]


def test_all_cases_give_the_same_scores_and_ratios_are_those_of_a_lap(model: Recommender) -> None:
    found = agent_batch.measured(model.parts, model.serving.trained, _histories(5), laps=3)
    rates = {row["case"]: row["values"] for row in found["cases"]}
    others = ["peft", "peft_last_mlp", "peft_joined", "stacked_with_fit", "one_by_one"]
    assert list(rates) == ["stacked", "stacked_kept", *others]
    pairs = [(first, other) for first in ("stacked", "stacked_kept") for other in others]
    for row, (first, other) in zip(found["rows"], pairs, strict=True):
        assert row["metric"] == f"{first}_over_{other}"
        expected = statistics.median(map(operator.truediv, rates[first], rates[other]))
        assert row["value"] == pytest.approx(expected)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert all(one["relative_difference"] < 1e-5 for one in found["agreement"].values())
    assert {one["shared_top_10"] for one in found["agreement"].values()} == {1.0}
    assert found["costs"]["peft_load_seconds_per_user"] > 0


def test_a_row_with_the_adapter_of_another_user_is_seen(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = mixed_batch.loaded

    def moved(parts: object, trained: object, private: Sequence[Tensors], merges: bool) -> object:
        return right(parts, trained, [*private[1:], private[0]], merges)  # type: ignore[arg-type]

    monkeypatch.setattr(mixed_batch, "loaded", moved)
    with pytest.raises(TrainingError, match="peft does not give the scores of stacked"):
        agent_batch.measured(model.parts, model.serving.trained, _histories(5), laps=1)


def test_the_users_of_a_run_are_ranked_for(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_experiment(tiny.config(tmp_path, method="pfm", federation__num_rounds=4))
    out = tmp_path / "batch.json"
    arguments = argparse.Namespace(run=run, users=4, laps=2, threads=1, seed=0, out=out)
    agent_batch.run(arguments)
    result = files.read_json(out)
    assert len(result["settings"]["events"]) == 4
    assert result["environment"]["threads"] == 1
    assert "stacked_over_peft " in capsys.readouterr().out
