"""The commit point: a kill, a full disk or a flipped bit never yields half a round."""

import dataclasses
import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import CheckpointError, CorruptFileError, DiskSpaceError, StorageError
from pfm_llm.server.checkpoint import Checkpoint, CheckpointStore, RunEnvironment, check_resumable

_ENVIRONMENT = RunEnvironment(
    config_hash="c0ffee",
    contract_hash="beef",
    data_hash="da7a",
    torch_version="2.13.0+cpu",
    device="cpu (AVX2)",
    threads=2,
    num_processes=1,
    tokens_per_chunk=6144,
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "server")


def _tensors(round_number: int, size: int = 6) -> dict[str, torch.Tensor]:
    return {
        "shared/lora.A": torch.full((size,), float(round_number)),
        "optimizer/step": torch.tensor(round_number),
    }


def _save(store: CheckpointStore, *rounds: int) -> None:
    for round_number in rounds:
        store.save(round_number, _tensors(round_number), _ENVIRONMENT)


def _assert_whole(checkpoint: Checkpoint | None, round_number: int, size: int = 6) -> None:
    assert checkpoint is not None
    assert checkpoint.round_number == round_number
    expected = _tensors(round_number, size)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], expected[name]) for name in expected)
    assert checkpoint.environment == _ENVIRONMENT


def _names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "server").iterdir())


def test_nothing_committed_is_none(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.load() is None
    assert store.rounds() == ()
    assert not (tmp_path / "server").exists()


def test_what_is_committed_comes_back_to_the_bit(store: CheckpointStore) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(2).double(), "step": torch.tensor(7)}
    store.save(10, tensors, _ENVIRONMENT)
    loaded = store.load()
    assert loaded is not None
    assert (loaded.round_number, loaded.environment) == (10, _ENVIRONMENT)
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(loaded.tensors[name].dtype is tensor.dtype for name, tensor in tensors.items())


def test_the_last_two_rounds_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    _save(store, 10, 20, 30)
    assert store.rounds() == (20, 30)
    assert _names(tmp_path) == [
        "commit.json",
        "round_000020.safetensors",
        "round_000030.safetensors",
    ]
    _assert_whole(store.load(), 30)
    _assert_whole(store.load(20), 20)
    with pytest.raises(CheckpointError, match="round 10 is not kept; kept rounds: 20, 30"):
        store.load(10)


def test_other_files_in_the_folder_are_left_alone(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "README").write_text("mine")
    (tmp_path / "server" / ".round_000005.safetensors.x1").write_text("of a killed save")
    (tmp_path / "server" / ".commit.json.x1").write_text("of a killed save")
    _save(store, 1)
    assert _names(tmp_path) == ["README", "commit.json", "round_000001.safetensors"]


@pytest.mark.parametrize("round_number", [9, 10])
def test_a_round_is_never_committed_twice(store: CheckpointStore, round_number: int) -> None:
    _save(store, 10)
    with pytest.raises(CheckpointError, match=f"round 10 is committed, so round {round_number}"):
        _save(store, round_number)
    _assert_whole(store.load(), 10)


def test_rollback_moves_the_commit_point(store: CheckpointStore, tmp_path: Path) -> None:
    _save(store, 10, 20)
    store.rollback(10)
    _assert_whole(store.load(), 10)
    assert store.rounds() == (10,)
    assert _names(tmp_path) == ["commit.json", "round_000010.safetensors"]
    _save(store, 20)
    _assert_whole(store.load(), 20)
    with pytest.raises(CheckpointError, match="round 15 is not kept"):
        store.rollback(15)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_round_is_named_with_the_way_on(
    store: CheckpointStore, tmp_path: Path, damage: str
) -> None:
    _save(store, 10, 20)
    path = tmp_path / "server" / "round_000020.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"round 20, .*round 10 is kept.*--from-round 10"):
        store.load()
    store.rollback(10)
    _assert_whole(store.load(), 10)


def test_a_damaged_only_round_says_start_again(store: CheckpointStore, tmp_path: Path) -> None:
    _save(store, 10)
    (tmp_path / "server" / "round_000010.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="no older round is kept: start the run again"):
        store.load()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"commits": []}',
        '{"commits": [{"round": 10}]}',
        '{"commits": [{"round": "ten", "sha256": "0"}]}',
        '{"commits": [{"round": 20, "sha256": "0"}, {"round": 10, "sha256": "0"}]}',
    ],
)
def test_a_damaged_commit_file_is_never_guessed_at(
    store: CheckpointStore, tmp_path: Path, content: str
) -> None:
    _save(store, 10)
    (tmp_path / "server" / "commit.json").write_text(content)
    for call in (store.load, store.rounds, lambda: _save(store, 20)):
        with pytest.raises(CorruptFileError, match=r"commit\.json is damaged.*delete the run"):
            call()
    assert (tmp_path / "server" / "round_000010.safetensors").exists()


def test_rounds_that_were_swapped_are_found(store: CheckpointStore, tmp_path: Path) -> None:
    _save(store, 10, 20)
    folder = tmp_path / "server"
    first, second = (folder / f"round_0000{number}.safetensors" for number in (10, 20))
    commit = json.loads((folder / "commit.json").read_text())
    # Files and checksums together, as when whole files were copied over each other.
    held, one, two = first.read_bytes(), *commit["commits"]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptFileError, match="does not match its recorded checksum"):
        store.load(10)
    second.write_bytes(held)
    one["sha256"], two["sha256"] = two["sha256"], one["sha256"]
    (folder / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(CorruptFileError, match=r"of round 20, .*\(it holds round 10\)"):
        store.load()


@pytest.mark.parametrize("name", ["commit.json", "round_000020.safetensors"])
def test_a_folder_in_place_of_a_file_is_named(
    store: CheckpointStore, tmp_path: Path, name: str
) -> None:
    _save(store, 10, 20)
    path = tmp_path / "server" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(CorruptFileError, match=name):
        store.load()


def test_a_file_in_place_of_the_folder_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "server").write_text("")
    with pytest.raises(CorruptFileError, match="server"):
        store.load()
    with pytest.raises(StorageError, match="server"):
        _save(store, 10)


def test_checkpoint_of_another_version_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    import pfm_llm.base.files as files

    _save(store, 10)
    path = tmp_path / "server" / "round_000010.safetensors"
    digest = files.write_tensors(path, _tensors(10), {"environment": '{"cores": 2}'})
    commit = json.loads((tmp_path / "server" / "commit.json").read_text())
    commit["commits"][0]["sha256"] = digest
    (tmp_path / "server" / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(CheckpointError, match="written by another version of pfm_llm"):
        store.load()


@pytest.mark.parametrize("failing_call", [1, 2])  # the round's file, commit.json
def test_full_disk_leaves_the_commit_point(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    _save(store, 10)
    calls = 0

    def full(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError, match="free some disk space"):
        _save(store, 20)
    _assert_whole(store.load(), 10)
    assert not [name for name in _names(tmp_path) if name.startswith(".")]
    _save(store, 20)  # there is space again
    _assert_whole(store.load(), 20)


_SYSCALLS = ("fsync", "replace", "unlink")


def _run_killed(store: CheckpointStore, fatal_call: int, after: bool) -> bool:
    """Save round 30 in a child that SIGKILLs itself at its n-th file system call.

    Returns:
        Whether the child was killed; False: it made fewer calls.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def wrap(name: str) -> None:
            real = getattr(os, name)

            def fatal(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fatal_call and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if calls == fatal_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(os, name, fatal)

        for name in _SYSCALLS:
            wrap(name)
        try:
            _save(store, 30)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True])
def test_kill_at_every_file_system_call_of_a_save(tmp_path: Path, after: bool) -> None:
    seen = []
    for fatal_call in range(1, 20):
        store = CheckpointStore(tmp_path / f"{fatal_call}" / "server")
        _save(store, 10, 20)
        killed = _run_killed(store, fatal_call, after)
        committed = store.rounds()[-1]
        _assert_whole(store.load(), committed)
        seen.append(committed)
        if not killed:
            break
        if committed == 20:
            _save(store, 30)
        _save(store, 40)
        assert _names(tmp_path / f"{fatal_call}") == [
            "commit.json",
            "round_000030.safetensors",
            "round_000040.safetensors",
        ]
    # fsync and replace of the file, fsync and replace of commit.json, unlink of round 10; then
    # one run to its end. Only the second replace commits.
    assert seen == ([20] * 3 + [30] * 3 if after else [20] * 4 + [30] * 2)


def test_kill_at_random_moments(tmp_path: Path) -> None:
    source = random.Random(0)
    store = CheckpointStore(tmp_path / "server")
    size = 20_000  # below what torch would split over threads, which a fork must not
    committed = tries = 0
    while tries < 12 or not committed:  # on a busy machine a child may not come to its first commit
        tries += 1
        child = os.fork()
        if child == 0:
            round_number = committed
            while True:
                round_number += 1
                store.save(round_number, _tensors(round_number, size), _ENVIRONMENT)
        time.sleep(source.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if store.rounds():
            assert store.rounds()[-1] >= committed
            committed = store.rounds()[-1]
            _assert_whole(store.load(), committed, size)


def test_equal_environments_are_resumable() -> None:
    check_resumable(_ENVIRONMENT, dataclasses.replace(_ENVIRONMENT))


def test_each_difference_is_named_with_both_values() -> None:
    current = dataclasses.replace(_ENVIRONMENT, threads=1, torch_version="2.14.0")
    with pytest.raises(CheckpointError) as raised:
        check_resumable(_ENVIRONMENT, current)
    message = str(raised.value)
    assert "torch_version was 2.13.0+cpu, is 2.14.0" in message
    assert "threads was 2, is 1" in message
    assert "start a new run under another name" in message
    assert "tokens_per_chunk" not in message


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunEnvironment)])
def test_every_part_of_the_environment_counts(field: str) -> None:
    value: Any = getattr(_ENVIRONMENT, field)
    other = {"n01": 3} if field == "population" else value * 2
    current = dataclasses.replace(_ENVIRONMENT, **{field: other})
    with pytest.raises(CheckpointError, match=f"{field} was"):
        check_resumable(_ENVIRONMENT, current)


def test_environment_of_this_process() -> None:
    here = RunEnvironment.here(
        config_hash="c",
        contract_hash="h",
        data_hash="d",
        num_processes=2,
        tokens_per_chunk=64,
        device=torch.device("cpu"),
    )
    assert here.torch_version == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert here.device.startswith("cpu (")
