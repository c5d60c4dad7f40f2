"""Files are whole or absent, checksums are kept, and disk errors say what to do."""

import errno
import hashlib
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DiskSpaceError, StorageError


def fail_with(number: int) -> Any:
    def fail(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_creates_folders_and_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"")
    assert path.read_bytes() == b""
    files.write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(files.os, call, fail_with(number))
    with pytest.raises(DiskSpaceError, match=r"no space left while writing .*file; free some"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_failures_are_storage_errors_that_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*below") as caught:
        files.write_bytes(tmp_path / "file" / "below", b"")
    assert not isinstance(caught.value, DiskSpaceError)


def test_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_one_version_or_another_never_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = [bytes([number]) * 200_000 for number in range(2)]
    files.write_bytes(path, versions[0])
    done = threading.Event()

    def write() -> None:
        for number in range(40):
            files.write_bytes(path, versions[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_bytes()}
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(versions)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_json_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"], ids=["empty", "cut", "bytes"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"x\.json is not valid JSON"):
        files.read_json(path)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_around_the_block_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    assert files.sha256_of(path) == hashlib.sha256(b"x" * size).hexdigest()


def test_tensors_round_trip_with_dtype_shape_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "view": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "none": torch.empty(0, 4),
        "grad": torch.ones(2, requires_grad=True),
        "one": torch.tensor(7, dtype=torch.int64),
    }
    digest = files.write_tensors(path, tensors, {"round": "3"})
    assert digest == files.sha256_of(path)
    loaded, metadata = files.read_tensors(path, expected_sha256=digest)
    assert metadata == {"round": "3"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert not loaded[name].requires_grad
    files.write_tensors(path, {})
    assert files.read_tensors(path) == ({}, {})


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    a, b = torch.ones(2), torch.zeros(3)
    first = files.write_tensors(tmp_path / "1", {"a": a, "b": b}, {"k": "v"})
    assert files.write_tensors(tmp_path / "2", {"b": b, "a": a}, {"k": "v"}) == first


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t"
    digest = files.write_tensors(path, {"a": torch.ones(2)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="recorded checksum"):
        files.read_tensors(path, expected_sha256=digest)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_found_without_a_checksum(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t"
    files.write_tensors(path, {"a": torch.ones(2)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        files.read_tensors(path)


def test_private_folder_is_the_owners_alone_even_when_it_was_open(tmp_path: Path) -> None:
    path = tmp_path / "x.private" / "clients"
    assert files.make_private_dir(path) == path
    path.chmod(0o755)
    files.make_private_dir(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_storage_errors_lets_other_exceptions_through(tmp_path: Path) -> None:
    with pytest.raises(json.JSONDecodeError), files.storage_errors(tmp_path):
        json.loads("{")


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    """Alone, safetensors writes several metadata keys in random order."""
    metadata = {f"key {i}": f"value {i}" for i in range(6)}
    tensors = {"a": torch.arange(3.0)}
    digests = {files.write_tensors(tmp_path / f"{i}", tensors, metadata) for i in range(8)}
    assert len(digests) == 1
    assert files.read_tensors(tmp_path / "0")[1] == metadata


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b"[" + b"9" * 5000 + b"]", "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_that_means_nothing_or_asks_for_much_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(CorruptFileError, match=problem):
        files.parse_json(content)
    assert files.parse_json(b"[" * 64 + b"]" * 64) is not None


def header_of(tree: object, data: bytes = b"") -> bytes:
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (1 << 62).to_bytes(8, "little") + b"{}",
        header_of([]),
        header_of({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}),
        header_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header_of({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header_of({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"1234"),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        header_of({"__metadata__": []}),
        header_of({"__metadata__": {"pfm_llm": "{"}}),
        header_of({"a": 1}),
    ],
)
def test_headers_that_do_not_fit_their_data_are_damage(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"x\.safetensors is not a whole safetensors file"):
        files.read_tensors(path)


# --- Ctrl-C, and folders where files should be ------------------------------------------------


def test_ctrl_c_while_tensors_are_read_or_written_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors calls Python, where an interrupt would be lost or be taken for damage."""
    path, finished = tmp_path / "a.safetensors", []

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            result = call(*arguments)
            finished.append(call)
            return result

        return run

    files.write_tensors(path, {"a": torch.ones(2)})
    for name in ("save", "load"):
        monkeypatch.setattr(files, name, interrupted(getattr(files, name)))
    with pytest.raises(KeyboardInterrupt):
        files.read_tensors(path)
    with pytest.raises(KeyboardInterrupt):
        files.write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(2)})
    assert len(finished) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_damaged_file_is_found_in_a_thread_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"damaged")
    with ThreadPoolExecutor(1) as pool, pytest.raises(CorruptFileError):
        pool.submit(files.read_tensors, path).result()


@pytest.mark.parametrize("read", [files.read_json, files.read_tensors, files.sha256_of])
def test_a_folder_in_place_of_a_file_is_a_typed_error(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=f"cannot read {tmp_path}: it is a folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


def test_a_folder_in_place_of_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        files.write_bytes(tmp_path / "a", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_ends_a_long_block_whatever_a_library_makes_of_it(swallowed: bool) -> None:
    """The load of a model may turn it into an error about the file, or lose it."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # the signal comes in between
        except KeyboardInterrupt:
            if not swallowed:
                raise ValueError("could not determine the shape of a storage") from None

    with pytest.raises(KeyboardInterrupt), files.interruptible():
        load()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_of_a_long_block_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="damaged"), files.interruptible():
        raise ValueError("damaged")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
