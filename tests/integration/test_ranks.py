"""Several processes: the same round as one, and no process that waits for one that has left."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base import files
from pfm_llm.base.errors import LaunchError
from pfm_llm.base.processes import check_launch
from tests.support.tiny import Tiny, leftovers, metrics_of, results_of

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "support" / "ranks_driver.py"
TRAIN = ROOT / "scripts" / "fed_train.py"
TIMEOUT_S = 600
# Chunks of one to three clients: five of them for a cohort of eight.
SETTINGS: dict[str, Any] = {"federation__cohort_size": 8, "runtime__tokens_per_chunk": 20}


def run(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with nothing of this process's launcher."""
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        list(map(str, command)), env=clean, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def accelerate(*arguments: str) -> list[str | Path]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    return [*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", TRAIN]


def torchrun(num_processes: int) -> list[str | Path]:
    return [
        sys.executable,
        *("-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"),
        f"--master_port={free_port()}",
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def driven(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What the driver found on one and on two processes."""
    return drive(tiny, tmp_path_factory.mktemp("ranks"), SETTINGS)


def drive(tiny: Tiny, root: Path, settings: dict[str, Any]) -> dict[int, Path]:
    """The driver's folders, by number of processes."""
    config = tiny.config_file(root / "config.yaml", root, **settings)
    folders = {}
    for count in (1, 2):
        folders[count] = root / str(count)
        folders[count].mkdir()
        launcher = [sys.executable] if count == 1 else torchrun(count)
        done = run([*launcher, DRIVER, config, folders[count]])
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def found(driven: dict[int, Path], index: int, count: int) -> dict[str, Any]:
    content: dict[str, Any] = files.read_json(driven[count] / f"{index}-of-{count}.json")
    return content


def test_chunks_are_of_the_cohort_and_shared_between_the_processes(driven: dict[int, Path]) -> None:
    alone, first, second = (found(driven, i, n) for i, n in ((0, 1), (0, 2), (1, 2)))
    assert alone["chunks"] == first["chunks"] == second["chunks"] == alone["own_chunks"] >= 4
    assert first["own_chunks"] + second["own_chunks"] == alone["chunks"]
    assert min(first["own_chunks"], second["own_chunks"]) >= 2
    assert alone["num_updates"] == first["num_updates"] == second["num_updates"] == 8


def test_aggregated_update_on_two_processes_equals_that_on_one(driven: dict[int, Path]) -> None:
    alone, first, second = (
        files.read_tensors(driven[n] / f"{i}-of-{n}.safetensors")[0]
        for i, n in ((0, 1), (0, 2), (1, 2))
    )
    assert alone.keys() == first.keys() == second.keys()
    for name, expected in alone.items():
        # The processes hold the same bits; against one process rounding may differ.
        assert torch.equal(first[name], second[name]), name
        scale = expected.abs().max()
        assert (first[name] - expected).abs().max() <= 1e-5 * scale, name
    assert sum(bool(expected.any()) for expected in alone.values()) > len(alone) // 2


@pytest.mark.slow
def test_median_of_clipped_updates_on_two_processes_equals_that_on_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    robust = {
        "federation__server__aggregator": "median",
        "federation__stages": [{"clip": {"norm": 0.1}}],
    }
    both = drive(tiny, tmp_path, {**SETTINGS, **robust})
    test_aggregated_update_on_two_processes_equals_that_on_one(both)
    noted = [found(both, i, n)["noted"] for i, n in ((0, 1), (0, 2), (1, 2))]
    assert noted[1] == noted[2]
    assert noted[1]["clip"] == pytest.approx(noted[0]["clip"], rel=1e-5)
    assert len(noted[0]["clip"]) == 8


@pytest.mark.slow
def test_updates_under_masks_on_two_processes_equal_those_on_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Two of eight clients vanish; each process plays some of the others, and unmasks by itself."""
    masks = {
        "federation__masks": True,
        "federation__stages": [{"clip": {"norm": 4.0}}],
        "federation__simulated_dropouts": 0.3,
    }
    both = drive(tiny, tmp_path, {**SETTINGS, **masks})
    test_aggregated_update_on_two_processes_equals_that_on_one(both)
    assert [found(both, i, n)["num_updates"] for i, n in ((0, 1), (0, 2), (1, 2))] == [6, 6, 6]
    assert min(found(both, i, 2)["own_chunks"] for i in (0, 1)) >= 1


@pytest.mark.parametrize("what", ["disk_full_at_commit", "disk_full_at_private_save"])
def test_full_disk_on_one_process_is_an_error_on_all(what: str, driven: dict[int, Path]) -> None:
    # With one that raises and one that waits, the driver would have run into its time limit.
    errors = [found(driven, index, 2)[what] for index in (0, 1)]
    assert errors[0] == errors[1]
    assert re.match(r"DiskSpaceError: no space left while writing .*free some disk", errors[0])


def test_failed_commits_leave_nothing_and_the_next_one_counts(driven: dict[int, Path]) -> None:
    for index in (0, 1):
        assert found(driven, index, 2)["rounds_after_failures"] == []
        assert found(driven, index, 2)["rounds_after_commit"] == [1]
    assert leftovers(driven[2]) == []


@pytest.mark.slow
def test_training_runs_on_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    settings = {**SETTINGS, "evaluation__every": 1, "federation__num_rounds": 2}
    config = tiny.config_file(tmp_path / "config.yaml", tmp_path, **settings)
    two = accelerate("--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}")
    done = run([*two, "--config", config])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder:") == 1
    alone = run([sys.executable, TRAIN, "--config", config, "--set", "name=alone"])
    assert alone.returncode == 0, alone.stderr[-3000:]
    for output in (done.stderr, alone.stderr):  # no terminal: log lines, no bars
        assert "federated rounds: 2/2" in output
        assert "%|" not in output
        assert "\r" not in output

    both = [tmp_path / "tiny", tmp_path / "alone"]
    names = [{str(p.relative_to(b)) for p in b.rglob("*") if p.is_file()} for b in both]
    assert names[0] == names[1]
    environment = files.read_json(both[0] / "environment.json")
    assert (environment["num_processes"], environment["threads"]) == (2, 1)
    # One server step from equal updates: the first losses are equal, later ones nearly.
    losses = [[record["loss"] for record in metrics_of(b)] for b in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all("validation" in metrics_of(b)[0] for b in both)
    rows = [results_of(b)["rows"] for b in both]
    describe = [
        [{k: v for k, v in r.items() if k[:2] not in ("va", "ci")} for r in rs] for rs in rows
    ]
    assert describe[0] == describe[1]
    untrained = [[r for r in rs if r["mode"] in ("none", "zero_shot")] for rs in rows]
    assert untrained[0] == untrained[1]


@pytest.mark.slow
def test_accelerate_on_cpu_that_starts_one_process_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config_file(tmp_path / "config.yaml", tmp_path)
    done = run([*accelerate("--cpu", "--num_processes=2"), "--config", config])
    assert done.returncode != 0
    assert "error: MASTER_ADDR is set but WORLD_SIZE is not" in done.stderr
    assert "accelerate launch -q --multi_gpu --num_processes 2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_an_error_of_ours_is_one_line_under_the_launcher(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config_file(tmp_path / "config.yaml", tmp_path / "runs", prompt="next_itm.v1")
    done = run([*accelerate("-q", "--num_processes=1"), "--config", config])
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "'next_itm.v1'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            "error: accelerate is set to FSDP",
        ),
        ({"distributed_type": "NO", "mixed_precision": "bf16"}, "mixed_precision: bf16 is ignored"),
    ],
)
def test_settings_in_the_home_folder_are_refused_or_said_to_be_ignored(
    settings: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "accelerate" / "default_config.yaml"
    files.write_json(home, {"num_processes": 1, "num_machines": 1, **settings})  # YAML too
    config = tiny.config_file(tmp_path / "c.yaml", tmp_path / "runs", prompt="next_itm.v1")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", TRAIN]
    done = run([*launch, "--config", config], HF_HOME=str(tmp_path / "home"))
    assert done.stderr.count(said) == 1
    # Several processes are started by torchrun, which adds a report of its own below the error.
    assert (
        "Traceback" not in done.stderr.partition("torch.distributed.elastic")[0].partition(said)[0]
    )


def test_processes_that_cannot_meet_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config_file(tmp_path / "config.yaml", tmp_path)
    done = run([sys.executable, TRAIN, "--config", config], WORLD_SIZE="2", RANK="0")
    assert done.returncode == LaunchError.exit_code
    assert re.match("error: WORLD_SIZE is 2 but MASTER_ADDR is not set", done.stderr)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_only_misleading_launches_are_refused() -> None:
    check_launch({})
    check_launch({"WORLD_SIZE": "1"})
    check_launch({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "1"})
    with pytest.raises(LaunchError, match="only one was started"):
        check_launch({"MASTER_ADDR": "127.0.0.1"})
