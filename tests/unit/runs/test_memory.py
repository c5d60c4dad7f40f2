"""A run says how much memory it needs before it loads the language model, and is about right."""

import dataclasses
import logging
from pathlib import Path

import pytest

from benchmarks.memory import summary, with_queries
from pfm_llm.base import files
from pfm_llm.base.processes import start_processes
from pfm_llm.runs.checks import plan
from pfm_llm.runs.checks.memory import (
    BASELINES,
    EVALUATION,
    LOADING,
    TEXTS,
    TRAINING,
    Shape,
    estimate_memory,
)
from pfm_llm.runs.checks.process import held_memory, peak_memory, shape_of
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.run import load_corpus, settled
from tests.support.tiny import NUM_USERS, TITLES, Tiny

SMALL = Shape(
    before=500_000_000,
    num_weights=100_000_000,
    stored=4,
    computed=2,
    hidden=500,
    inner=1500,
    num_top=2,
    table=5_000_000,
    of_codes=0,
    num_items=2_000,
    num_users=1_000,
    users_per_client=1,
    num_events=100_000,
    longest=16,
    usual=16,
    cohort=8,
    chunk_tokens=2048,
    window_items=8,
    tokens_per_item=10,
    baselines=("popularity",),
)


EASE, MIXED = ("ease",), ("ease_markov",)
READ = "scores of a chunk of queries"
SCORES, UPDATES = "scores of a chunk of clients", "gradients and updates of a chunk of clients"


def changed(**values: object) -> Shape:
    return dataclasses.replace(SMALL, **values)  # type: ignore[arg-type]


def test_a_small_run_peaks_while_the_weights_are_there_twice() -> None:
    found = estimate_memory(SMALL)
    assert found.phase == LOADING
    # 500 MB of libraries and data, 100 M weights of four bytes and the same of two.
    assert found.total == 500_000_000 + 400_000_000 + 200_000_000
    assert list(found.parts.values()) == sorted(found.parts.values(), reverse=True)
    assert estimate_memory(changed(computed=4)).parts.get("weights as they are stored") is None


@pytest.mark.parametrize(
    ("values", "phase", "part"),
    [
        # The users of a silo are evaluated together.
        (
            {"users_per_client": 20_000, "num_items": 20_000, "window_items": 1, "baselines": ()},
            EVALUATION,
            READ,
        ),
        ({"num_users": 10_000, "num_items": 17_000, "baselines": EASE}, BASELINES, "EASE"),
        ({"num_users": 90_000, "num_items": 17_000, "baselines": MIXED}, BASELINES, "EASE"),
        # A client with 64 windows of 16 items scores 1,024 times the catalogue.
        ({"longest": 1024, "num_items": 20_000}, TRAINING, SCORES),
        ({"cohort": 100, "table": 24_000_000}, TRAINING, UPDATES),
        (
            {"num_items": 300_000, "chunk_tokens": 65_536, "window_items": 1, "baselines": ()},
            EVALUATION,
            READ,
        ),
        (
            {"num_weights": 1_000_000, "hidden": 8192, "inner": 30_000, "longest": 1, "cohort": 1}
            | {"chunk_tokens": 10, "usual": 1, "baselines": ()},
            TEXTS,
            "a batch of texts",
        ),
    ],
)  # fmt: skip
def test_what_is_large_decides_the_phase(values: dict[str, object], phase: str, part: str) -> None:
    found = estimate_memory(changed(**values))
    assert (found.phase, next(iter(found.parts))) == (phase, part)


def test_ease_holds_three_matrices_of_the_smaller_side_and_its_weights() -> None:
    shape = changed(num_users=10_000, num_items=17_000, baselines=("popularity", "ease"))
    square, weights = 8 * 10_000**2, 8 * 10_000 * 17_000
    assert estimate_memory(shape).parts["EASE"] == 3 * square + weights
    # Fewer users need less, by both sides.
    fewer = estimate_memory(dataclasses.replace(shape, num_users=5_000))
    assert fewer.total < estimate_memory(shape).total


def test_the_shape_of_a_run_is_that_of_its_model_and_data(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, window__max_windows=2)
    data = load_corpus(config)
    found = shape_of(settled(config, data), data)
    assert (found.num_users, found.num_items) == (NUM_USERS, len(TITLES))
    assert (found.hidden, found.inner, found.stored, found.computed) == (32, 48, 4, 4)
    assert found.longest == 2 * 4  # windows of four items
    model = sum(path.stat().st_size for path in tiny.model.glob("*.safetensors"))
    assert found.num_weights * 4 == pytest.approx(model, rel=0.1)
    assert 0 < found.before < 2 * peak_memory()


def test_a_run_that_does_not_fit_is_told_what_lowers_its_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny.config(tmp_path)
    data = load_corpus(config)
    config, processes = settled(config, data), start_processes(1)
    assert plan.check_memory(config, data, processes) is not None
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "of memory (largest, in" in caplog.text
    monkeypatch.setattr(plan, "free_memory", lambda: -held_memory())
    plan.check_memory(config, data, processes)
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "may end for lack of memory" in warning.getMessage()
    assert set(plan._REMEDIES) == {LOADING, TEXTS, TRAINING, EVALUATION, BASELINES}


def test_a_run_keeps_its_estimate_and_its_peak(tiny: Tiny, tmp_path: Path) -> None:
    folder = run_experiment(tiny.config(tmp_path / "runs"))
    found = summary(files.read_json(folder / "results.json"), ["a.b=1", "data.source=/home"], None)
    assert found["estimated_bytes"] == sum(found["parts"].values())
    assert 0 < found["measured_bytes"] <= peak_memory()
    assert found["estimate_over_measured"] == found["estimated_bytes"] / found["measured_bytes"]
    assert found["settings"] == ["a.b=1"]


def test_fewer_users_are_evaluated_and_all_train(tiny: Tiny, tmp_path: Path) -> None:
    data = load_corpus(tiny.config(tmp_path))
    fewer = with_queries(data, 3)
    assert len(fewer.split.test.users) == len(fewer.split.validation.users) == 3
    assert fewer.split.train is data.split.train
