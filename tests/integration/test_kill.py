"""kill -9 at any moment: nothing half-written counts, and the resumed run ends with equal bits."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.checkpoint import CheckpointStore
from tests.support.kills import World
from tests.support.tiny import Tiny, leftovers, metrics_of, results_of, tensor_files

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "federation__num_rounds": 6,
    "evaluation__every": 3,
    "evaluation__baselines": [],
}
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny.config(tmp_path_factory.mktemp("whole"), **SETTINGS))


@pytest.fixture(scope="module")
def num_renames(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many files a whole run puts in place."""
    count = 0
    replace = os.replace

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        run_experiment(tiny.config(tmp_path_factory.mktemp("counted"), **SETTINGS))
    return count


def assert_equal_ends(run: Path, uninterrupted: Path) -> None:
    assert tensor_files(run) == tensor_files(uninterrupted)
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert results_of(run)["rows"] == results_of(uninterrupted)["rows"]
    assert leftovers(run, run.with_name(f"{run.name}.private")) == []


def assert_all_whole(run: Path) -> None:
    """Whatever is on disk under its real name reads back without a complaint."""
    CheckpointStore(RunFolders.of(run).server).load()
    MetricsLog(run / "metrics.jsonl").read()
    store = PrivateStore(run.with_name(f"{run.name}.private"))
    for client_id in store.client_ids():
        store.load_personalised(client_id)
        for version in store.versions(client_id):
            assert store.load(client_id, version) is not None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def was_killed(config: ExperimentConfig, resume: bool, arm: Callable[[], None]) -> bool:
    """Run an experiment in a forked child that ``arm`` has prepared to kill itself."""
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        code = 1
        try:
            arm()
            run_experiment(config, resume=resume)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0
    return killed


def at_rename(
    matches: Callable[[str], bool], nth: int = 1, after: bool = False
) -> Callable[[], None]:
    """Die just before, or just after, the nth file whose name matches is put in place."""

    def arm() -> None:
        replace, seen = os.replace, 0

        def deadly(source: Any, target: Any) -> None:
            nonlocal seen
            seen += matches(Path(target).name)
            if seen >= nth and not after:
                die()
            replace(source, target)
            if seen >= nth:
                die()

        os.replace = deadly

    return arm


def in_a_line_of_metrics() -> None:
    """Die when half of the line of round 3 is written."""
    append = MetricsLog.append

    def deadly(log: MetricsLog, record: Any) -> None:
        if record["round"] == 3:
            with log.path.open("a") as file:
                file.write('{"round": 3, "lo')
            die()
        append(log, record)

    MetricsLog.append = deadly  # type: ignore[method-assign]


def named(start: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(start)


@pytest.mark.parametrize(
    ("arm", "committed"),
    [
        pytest.param(at_rename(named("private.r000001"), 2), 0, id="within the first cohort"),
        pytest.param(at_rename(named("private.r000003"), 3), 2, id="within a later cohort"),
        pytest.param(in_a_line_of_metrics, 2, id="within a line of metrics"),
        pytest.param(at_rename(named("round_000004")), 2, id="before the checkpoint's file"),
        pytest.param(
            at_rename(named("round_000004"), after=True), 2, id="between checkpoint and commit"
        ),
        pytest.param(at_rename(named("commit.json"), 2, after=True), 4, id="right after a commit"),
        pytest.param(at_rename(named("commit.json"), 3, after=True), 6, id="in the last commit"),
        pytest.param(at_rename(named("personalised."), 5), 6, id="within the last evaluation"),
        pytest.param(at_rename(named("results.json")), 6, id="before the results"),
        pytest.param(at_rename(named("recommender_head")), 6, id="within the export"),
    ],
)
def test_killed_at_a_known_point(
    arm: Callable[[], None], committed: int, tiny: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    config = tiny.config(tmp_path, **SETTINGS)
    assert was_killed(config, False, arm)
    run = tmp_path / "tiny"
    assert_all_whole(run)
    assert (CheckpointStore(RunFolders.of(run).server).rounds() or (0,))[-1] == committed
    run_experiment(config, resume=True)
    assert_equal_ends(run, uninterrupted)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(
    seed: int, tiny: Tiny, tmp_path: Path, uninterrupted: Path, num_renames: int
) -> None:
    config, run = tiny.config(tmp_path, **SETTINGS), tmp_path / "tiny"
    draw = random.Random(seed)
    kills = 0
    for attempt in range(5):
        # The first file of all is the config, without which there is no run to resume.
        point = at_rename(lambda _: True, draw.randint(2, num_renames // 2), draw.random() < 0.5)
        if not was_killed(config, attempt > 0, point):
            break
        kills += 1
        assert_all_whole(run)
    assert kills >= 2
    run_experiment(config, resume=True)
    assert_equal_ends(run, uninterrupted)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_from_the_first_asset_to_the_export(
    seed: int, tmp_path: Path
) -> None:
    """A few of the kills of `make kills`."""
    kills, differing = World(tmp_path, seed).chain(3)
    assert kills >= 1
    assert differing == []


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_the_script_killed_twice_and_resumed(
    tiny: Tiny, tmp_path: Path, uninterrupted: Path
) -> None:
    file = tiny.config_file(tmp_path / "config.yaml", tmp_path, **SETTINGS)
    command = [sys.executable, str(ROOT / "scripts" / "fed_train.py"), "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "tiny"

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def lines() -> int:
        log = run / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    moments: list[tuple[list[str], Callable[[], bool]]] = [
        ([], lambda: lines() >= 3),
        (["--resume"], lambda: (RunFolders.of(run).server / "round_000004.safetensors").exists()),
    ]
    for arguments, moment in moments:
        with start(*arguments) as process:
            wait_for(moment, process)
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert_all_whole(run)
    with start("--resume") as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors.decode()[-3000:]
    assert_equal_ends(run, uninterrupted)
