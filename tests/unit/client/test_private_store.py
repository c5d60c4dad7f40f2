"""The private store: versions, the commit point, modes, damage, and leaving nothing behind."""

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pfm_llm.base.errors import CorruptFileError, DiskSpaceError, StorageError
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.protocol.types import PrivateState


@pytest.fixture
def store(tmp_path: Path) -> PrivateStore:
    return PrivateStore(tmp_path / "run.private")


def _state(client_id: str, version: int, value: float | None = None) -> PrivateState:
    filled = torch.full((2, 3), float(version) if value is None else value)
    return PrivateState(client_id, version, {"private.m.A": filled, "private.s": torch.tensor(1.0)})


def _value(state: PrivateState | None) -> float | None:
    return None if state is None else state.tensors["private.m.A"][0, 0].item()


def _files(store: PrivateStore, client_id: str) -> list[Path]:
    return sorted(store.client_dir(client_id).iterdir())


def test_what_is_saved_comes_back_to_the_bit(store: PrivateStore) -> None:
    tensors = {"private.m.A": torch.randn(4, 3).T, "private.none": torch.zeros(0, 2)}
    store.save(PrivateState("u1", 12, tensors))
    loaded = store.load("u1")
    assert loaded is not None
    assert (loaded.client_id, loaded.version) == ("u1", 12)
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_state_without_tensors_is_a_state(store: PrivateStore) -> None:
    store.save(PrivateState("u1", 0, {}))
    assert store.load("u1") == PrivateState("u1", 0, {})


def test_versions_are_chosen_by_round(store: PrivateStore) -> None:
    for version in (3, 10, 1_000_000):  # a million has more digits than the names are padded to
        store.save(_state("u1", version))
    assert store.versions("u1") == (3, 10, 1_000_000)
    assert _value(store.load("u1")) == 1_000_000.0
    assert _value(store.load("u1", at_most=999_999)) == 10.0
    assert _value(store.load("u1", at_most=10)) == 10.0
    assert _value(store.load("u1", at_most=9)) == 3.0
    assert _value(store.load("u1", version=10)) == 10.0
    assert store.load("u1", at_most=2) is None
    assert store.load("u1", version=4) is None
    assert store.load("u1", version=10, at_most=9) is None


def test_unknown_client_has_nothing_and_gets_no_folder(store: PrivateStore) -> None:
    assert store.load("nobody") is None
    assert store.load_personalised("nobody") is None
    assert store.versions("nobody") == ()
    store.forget("nobody")
    assert store.client_ids() == ()


def test_same_version_is_replaced(store: PrivateStore) -> None:
    store.save(_state("u1", 4, value=1.0))
    store.save(_state("u1", 4, value=2.0))
    assert _value(store.load("u1")) == 2.0
    assert len(_files(store, "u1")) == 1


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    root = tmp_path / "run.private"
    root.mkdir(mode=0o755)
    old = os.umask(0)
    try:
        store = PrivateStore(root)
        store.save(_state("u1", 1))
        store.save_personalised(_state("u1", 1))
    finally:
        os.umask(old)
    for path in [root, *root.rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_discard_newer_goes_back_to_the_commit(store: PrivateStore) -> None:
    for version in (2, 5, 6, 9):
        store.save(_state("u1", version))
    store.save(_state("u2", 7))
    store.save_personalised(_state("u1", 8))
    store.save_personalised(_state("u2", 5))
    # u1: 6, 9 and the personalised 8; u2: 7
    assert store.discard_newer(5) == 4
    assert store.versions("u1") == (2, 5)
    assert store.load("u2") is None
    assert store.load_personalised("u1") is None
    assert _value(store.load_personalised("u2")) == 5.0
    assert store.discard_newer(5) == 0


def test_discard_newer_removes_what_a_killed_write_left(store: PrivateStore) -> None:
    store.save(_state("u1", 1))
    directory = store.client_dir("u1")
    (directory / ".private.r000002.safetensors.k3j4.tmp").write_bytes(b"half")
    (directory / ".personalised.r000002.safetensors.x.tmp").write_bytes(b"half")
    (directory / ".cache").write_bytes(b"another module's")
    assert store.discard_newer(1) == 0
    assert [path.name for path in _files(store, "u1")] == [".cache", "private.r000001.safetensors"]


def test_prune_keeps_the_newest_committed_and_everything_newer(store: PrivateStore) -> None:
    for version in (1, 4, 8, 11, 15):
        store.save(_state("u1", version))
    store.save(_state("u2", 3))
    store.save(_state("u3", 20))
    assert store.prune(10) == 2  # u1: 1 and 4; 8 is what round 10 would resume from
    assert store.versions("u1") == (8, 11, 15)
    assert _value(store.load("u1", at_most=10)) == 8.0
    assert store.versions("u2") == (3,)
    assert store.versions("u3") == (20,)


def test_personalised_state_is_apart_and_one(store: PrivateStore) -> None:
    store.save(_state("u1", 3))
    store.save_personalised(_state("u1", 100))
    store.save_personalised(_state("u1", 50))  # a rolled back run
    assert _value(store.load_personalised("u1")) == 50.0
    assert len(_files(store, "u1")) == 2
    assert store.versions("u1") == (3,)
    assert _value(store.load("u1")) == 3.0


def test_forget_takes_the_caches_too(store: PrivateStore) -> None:
    for client_id in ("u1", "u10"):
        store.save(_state(client_id, 1))
    (store.client_dir("u1") / "trunk").mkdir()
    (store.client_dir("u1") / "trunk" / "states.bin").write_bytes(b"history")
    store.forget("u1")
    assert store.client_ids() == ("u10",)
    assert _value(store.load("u10")) == 1.0


@pytest.mark.parametrize(
    "client_id", ["", ".", "..", ".x", "a/b", "../a", "a b", "é", "a\n", "a" * 201]
)
def test_unsafe_client_ids_are_refused(store: PrivateStore, client_id: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.save(_state(client_id, 1)),
        lambda: store.load(client_id),
        lambda: store.client_dir(client_id),
        lambda: store.forget(client_id),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="is no safe folder name"):
            call()


@pytest.mark.parametrize("client_id", ["0", "silo-3", "A.b_c", "-1", "a" * 200])
def test_safe_client_ids(store: PrivateStore, client_id: str) -> None:
    store.save(_state(client_id, 1))
    assert store.client_ids() == (client_id,)


@pytest.mark.parametrize(
    ("tensors", "version"),
    [
        ({"lora.m.A": torch.zeros(1)}, 1),
        ({"private.m.A": torch.zeros(1).half()}, 1),
        ({"private.m.A": torch.zeros(1)}, -1),
    ],
)
def test_what_is_no_private_state_is_not_written(
    store: PrivateStore, tensors: dict[str, torch.Tensor], version: int
) -> None:
    with pytest.raises(StorageError, match="client 'u1'"):
        store.save(PrivateState("u1", version, tensors))
    assert store.client_ids() == ()


def test_every_flipped_bit_is_noticed(store: PrivateStore) -> None:
    store.save(_state("u1", 7))
    (path,) = _files(store, "u1")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        if whole[position] == ord(" "):  # it pads the header: nothing that was saved changed
            continue
        with pytest.raises(CorruptFileError, match=r"'u1' after round 7.*delete the file to go on"):
            store.load("u1")


@pytest.mark.parametrize("size", [0, 7, 100])
def test_truncated_file_is_corrupt(store: PrivateStore, size: int) -> None:
    store.save(_state("u1", 7))
    (path,) = _files(store, "u1")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptFileError, match="client 'u1' after round 7"):
        store.load("u1")


def test_file_of_another_client_or_round_is_corrupt(store: PrivateStore) -> None:
    store.save(_state("u1", 7))
    (path,) = _files(store, "u1")
    (store.client_dir("u2") / path.name).write_bytes(path.read_bytes())
    path.rename(path.with_name("private.r000008.safetensors"))
    for client_id in ("u1", "u2"):
        with pytest.raises(CorruptFileError, match="does not match its checksum"):
            store.load(client_id)


def test_unreadable_file_is_a_storage_error(store: PrivateStore) -> None:
    (store.client_dir("u1") / "private.r000001.safetensors").mkdir()
    with pytest.raises(StorageError, match="client 'u1'"):
        store.load("u1")


def test_full_disk_leaves_the_version_before(
    store: PrivateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(_state("u1", 1))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for save in (store.save, store.save_personalised):
        with pytest.raises(DiskSpaceError, match="free some disk space"):
            save(_state("u1", 2))
    assert len(_files(store, "u1")) == 1
    assert _value(store.load("u1")) == 1.0


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_kill_during_a_save_leaves_whole_versions(store: PrivateStore, function: str) -> None:
    store.save(_state("u1", 1))
    child = os.fork()
    if child == 0:
        setattr(os, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        store.save(_state("u1", 2))
        os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert store.versions("u1") == (1,)
    assert len(_files(store, "u1")) == 2  # the temporary file
    store.discard_newer(1)
    assert len(_files(store, "u1")) == 1
    assert _value(store.load("u1")) == 1.0


def test_an_interrupt_while_a_state_is_read_is_no_damage(
    store: PrivateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(_state("u1", 7))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfm_llm.base.files.load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.load("u1")
