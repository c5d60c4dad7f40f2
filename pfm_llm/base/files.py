"""Atomic writes, checksums, and clear disk errors: a file is complete or absent."""

import contextlib
import errno
import hashlib
import json
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pfm_llm.base.errors import ConfigError, CorruptFileError, DiskSpaceError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_PRIVATE_DIR_MODE = 0o700
_TEMPORARY = ".tmp"
_METADATA_KEY = "pfm_llm"
_MAX_DEPTH = 64
_LENGTH_BYTES = 8


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into a `StorageError` that names the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskSpaceError(
                f"no space left while writing {path}; free some disk space and run again "
                "(everything that was committed before is intact)"
            ) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path``, other than its absence, into a `StorageError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else error.strerror or error
        raise StorageError(f"cannot read {path}: {reason}") from error


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C until the block ends.

    safetensors calls back into Python, where an interruption may be lost or become an error about
    the file.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    try:
        signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block as Ctrl-C, at once, whatever a library in it makes of it.

    It is for blocks that are too long for `_uninterrupted`, such as the load of a model.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    raised: list[BaseException] = []

    def noted(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as interruption:
            raised.append(interruption)
            raise

    try:
        signal.signal(signal.SIGINT, noted)
        yield
    except BaseException as error:
        if raised and error is not raised[0]:
            raise raised[0] from error
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
    if raised:  # the library has swallowed it
        raise raised[0]


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically: a reader sees the old file or the complete new one.

    Raises:
        DiskSpaceError: The disk is full; no temporary file is left.
        StorageError: Any other failure to write.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def remove_temporary(folder: Path) -> None:
    """Delete temporary files of killed processes below ``folder``; call it while none writes there.

    Raises:
        StorageError: A file could not be deleted.
    """
    with storage_errors(folder):
        for path in folder.rglob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON with a final newline. NaN is refused (``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: There is no such file.
        NotADirectoryError: A folder of its path is a file.
        StorageError: It is a folder, or cannot be read.
    """
    with _read_errors(path):
        return path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file; see `read_bytes` and `parse_json`.

    Raises:
        CorruptFileError: The file is not valid JSON.
        StorageError: The file cannot be read, for example because it is a folder.
        FileNotFoundError: There is no file.
    """
    content = read_bytes(path)
    try:
        return parse_json(content)
    except CorruptFileError as error:
        raise CorruptFileError(f"{path} {error}; delete it") from error


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON that nobody needs to trust.

    Raises:
        CorruptFileError: It is not valid JSON, has a key twice, a number that is not finite or is
            too long, or is nested more than 64 deep. The message has no subject.
    """
    try:
        tree = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(tree)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"is not valid JSON ({error})") from error
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return tree


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _check_depth(tree: Any) -> None:
    level = [tree]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        StorageError: The file cannot be read, for example because it is a folder.
        FileNotFoundError: There is no file.
    """
    with _read_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file atomically.

    Args:
        path: The file.
        tensors: Name to tensor; moved to the CPU and made contiguous as needed.
        metadata: Strings for the file's header. They are stored as JSON under one key, because
            safetensors writes several keys in random order. Equal content then gives equal bytes.

    Returns:
        The SHA-256 of the file, in hex.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    with _uninterrupted():
        content = save(ready, header)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(
    path: Path, expected_sha256: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file into memory; see `read_bytes`.

    Args:
        path: The file.
        expected_sha256: When given, the content must have this hash.

    Returns:
        The tensors and the header's metadata.

    Raises:
        CorruptFileError: The file is truncated, not safetensors, or has another hash.
        StorageError: The file cannot be read, for example because it is a folder.
        FileNotFoundError: There is no file.
    """
    content = read_bytes(path)
    if expected_sha256 is not None and hashlib.sha256(content).hexdigest() != expected_sha256:
        raise CorruptFileError(f"{path} does not match its recorded checksum")
    try:
        metadata = tensors_header(content).get("__metadata__", {})
        return parse_tensors(content), json.loads(metadata.get(_METADATA_KEY, "{}"))
    except (CorruptFileError, ValueError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is not a whole safetensors file ({error})") from error


def parse_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, from its bytes.

    Ctrl-C waits until they are read; see `_uninterrupted`.

    Raises:
        CorruptFileError: The content is truncated or not safetensors. The message has no subject.
    """
    try:
        with _uninterrupted():
            return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise CorruptFileError(str(error) or repr(error)) from error


def tensors_header(start: bytes) -> dict[str, Any]:
    """The header of a safetensors file.

    Args:
        start: The file's bytes, at least up to the end of its header.

    Raises:
        CorruptFileError: The header is cut, or is no JSON object. The message has no subject.
    """
    end = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < end:
        raise CorruptFileError("its header is cut")
    header = parse_json(start[_LENGTH_BYTES:end])
    if not isinstance(header, dict):
        raise CorruptFileError("its header is no JSON object")
    return header


def make_private_dir(path: Path) -> Path:
    """Create ``path`` (and missing parents) readable by its owner alone; return it."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_DIR_MODE)
        path.chmod(_PRIVATE_DIR_MODE)
    return path


def make_own_dir(path: Path, may_hold: Set[str]) -> Path:
    """`check_own_dir`, then `make_private_dir`."""
    check_own_dir(path, may_hold)
    return make_private_dir(path)


def check_own_dir(path: Path, may_hold: Set[str]) -> None:
    """Check that a folder can become one for its owner alone.

    Args:
        path: The folder; it need not exist.
        may_hold: Names of files that it may hold already.

    Raises:
        ConfigError: It holds something else.
    """
    if other := sorted({child.name for child in path.glob("*")} - may_hold):
        raise ConfigError(
            f"{path} holds {other[0]}, and is to become a folder for its owner alone; give a new "
            "one, or an empty one"
        )
