"""Two processes that want one run: each start gets a folder of its own, a run is worked on once."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import BusyError
from pfm_llm.config.schema import load_config
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.study.run import study_run
from tests.support.tiny import Tiny, metrics_of, tensor_files

SETTINGS: dict[str, Any] = {"federation__num_rounds": 2, "evaluation__baselines": []}


def test_two_starts_of_one_name_at_one_moment(tiny: Tiny, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def start(seed: int) -> None:
        config = tiny.config(tmp_path, **SETTINGS, seed=seed)
        together.wait(60)
        run_experiment(config)

    starts = [context.Process(target=start, args=(seed,)) for seed in (0, 1)]
    for process in starts:
        process.start()
    for process in starts:
        process.join(300)
    assert [process.exitcode for process in starts] == [0, 0]
    runs = [tmp_path / "tiny", tmp_path / "tiny-2"]
    assert sorted(load_config(run / "config.yaml").seed for run in runs) == [0, 1]
    for run in runs:
        seed = load_config(run / "config.yaml").seed
        alone = run_experiment(tiny.config(tmp_path / f"alone{seed}", **SETTINGS, seed=seed))
        assert metrics_of(run) == metrics_of(alone)
        assert (run / SHARED).read_bytes() == (alone / SHARED).read_bytes()


SHARED = "shared_adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny.config(tmp_path_factory.mktemp("run"), **SETTINGS))


def resume(run: Path) -> Path:
    return run_experiment(load_config(run / "config.yaml"), resume=True)


@pytest.mark.parametrize("work", [resume, evaluate_run, partial(study_run, budget="small")])
def test_a_run_in_work_is_left_alone(work: Callable[[Path], Any], run: Path) -> None:
    before = metrics_of(run), tensor_files(run)
    busy = pytest.raises(BusyError, match=r"another process is working on .*wait for its end")
    with RunFolders.of(run).in_work(), busy:
        work(run)
    assert (metrics_of(run), tensor_files(run)) == before
    work(run)
