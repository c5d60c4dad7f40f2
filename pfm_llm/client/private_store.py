"""The store of private states: a separate folder on the client's side that only its owner can read.

``<root>/clients/<client_id>/`` holds everything that is deleted when a client leaves:
``private.r000012.safetensors``, the private state after round 12;
``personalised.r000100.safetensors``, the state for evaluation and serving; and the caches of other
modules. The server's checkpoint is the commit point. On resume, newer states are discarded, so that
no round counts twice.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch

from pfm_llm.base.errors import CorruptFileError, StorageError
from pfm_llm.base.files import (
    make_private_dir,
    read_tensors,
    remove_temporary,
    storage_errors,
    write_tensors,
)
from pfm_llm.protocol.types import PRIVATE_PREFIX, PrivateState, Tensors

_CLIENT_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_TRAINED, _PERSONALISED = "private", "personalised"
_FILE = re.compile(rf"({_TRAINED}|{_PERSONALISED})\.r(\d{{6,}})\.safetensors")


class PrivateStore:
    """Private states by client and version. Listings read file names only."""

    def __init__(self, root: Path) -> None:
        """Open a store; create its folder if it is missing.

        Args:
            root: Such as ``runs/<name>.private``; its mode becomes 0700.

        Raises:
            StorageError: The folder cannot be made.
        """
        self._root = make_private_dir(root)
        self._clients = root / "clients"

    def client_ids(self) -> tuple[str, ...]:
        """The clients that have a folder, sorted."""
        return tuple(sorted(e for e in _entries(self._clients) if _CLIENT_ID.fullmatch(e)))

    def client_dir(self, client_id: str) -> Path:
        """The client's own folder (mode 0700), created if it is missing; `forget` deletes it.

        Raises:
            StorageError: The id is no safe folder name, or the folder cannot be made.
        """
        path = self._path(client_id)
        for directory in (self._root, self._clients):
            make_private_dir(directory)
        return make_private_dir(path)

    def save(self, state: PrivateState) -> None:
        """Write a client's state after a round; the same version is replaced.

        Raises:
            DiskSpaceError: The disk is full; earlier versions are intact.
            StorageError: A tensor is not a private one or not float32, or a failure to write.
        """
        self._write(_TRAINED, state)

    def load(
        self, client_id: str, version: int | None = None, at_most: int | None = None
    ) -> PrivateState | None:
        """Read a client's state.

        Args:
            client_id: The client.
            version: Exactly this version; None: the newest.
            at_most: The newest version up to this round; None: no limit.

        Returns:
            None when there is no such version.

        Raises:
            CorruptFileError: The file is damaged; the message names client and remedy.
            StorageError: The file cannot be read.
        """
        versions = self.versions(client_id)
        if version is not None:
            versions = tuple(v for v in versions if v == version)
        if at_most is not None:
            versions = tuple(v for v in versions if v <= at_most)
        return self._read(_TRAINED, client_id, versions[-1]) if versions else None

    def versions(self, client_id: str) -> tuple[int, ...]:
        """The versions of a client's state, oldest first."""
        return tuple(sorted(self._files(_TRAINED, client_id)))

    def save_personalised(self, state: PrivateState) -> None:
        """Write the state for evaluation and serving; it replaces the previous one.

        Args:
            state: Its version is the round whose shared state it was fitted to.

        Raises:
            DiskSpaceError: The disk is full; the previous state is intact.
            StorageError: As in `save`.
        """
        self._write(_PERSONALISED, state)
        for version, path in self._files(_PERSONALISED, state.client_id).items():
            if version != state.version:
                _unlink(path)

    def load_personalised(self, client_id: str) -> PrivateState | None:
        """Read the state for evaluation and serving; None if there is none.

        Raises:
            CorruptFileError: The file is damaged; the message names client and remedy.
            StorageError: The file cannot be read.
        """
        versions = self._files(_PERSONALISED, client_id)
        return self._read(_PERSONALISED, client_id, max(versions)) if versions else None

    def serving(self, client_id: str, at_most: int | None = None) -> PrivateState | None:
        """The state that serves a client: the personalised one, else the newest of training.

        Args:
            client_id: The client.
            at_most: As in `load`.

        Raises:
            CorruptFileError: The file is damaged; the message names client and remedy.
            StorageError: The file cannot be read.
        """
        return self.load_personalised(client_id) or self.load(client_id, at_most=at_most)

    def discard_newer(self, round_number: int) -> int:
        """Delete all states after a round, including personalised ones.

        Call it on resume, with the committed round, while no process writes. It also deletes the
        temporary files of a killed process.

        Returns:
            Number of deleted states.
        """
        remove_temporary(self._root)
        discarded = 0
        for client_id in self.client_ids():
            for kind in (_TRAINED, _PERSONALISED):
                for version, path in self._files(kind, client_id).items():
                    if version > round_number:
                        _unlink(path)
                        discarded += 1
        return discarded

    def prune(self, oldest_commit: int) -> int:
        """Delete states that no kept checkpoint needs.

        Each client keeps its newest version up to ``oldest_commit``, and every later version.

        Args:
            oldest_commit: The oldest round that the run may still go back to.

        Returns:
            Number of deleted states.
        """
        deleted = 0
        for client_id in self.client_ids():
            files = self._files(_TRAINED, client_id)
            for version in sorted(v for v in files if v <= oldest_commit)[:-1]:
                _unlink(files[version])
                deleted += 1
        return deleted

    def forget(self, client_id: str) -> None:
        """Delete the client's folder with all states and caches, if there is one.

        Raises:
            StorageError: A file could not be deleted; call it again.
        """
        _delete_tree(self._path(client_id))

    def _path(self, client_id: str) -> Path:
        if not _CLIENT_ID.fullmatch(client_id):
            raise StorageError(
                f"client id {client_id!r} is no safe folder name; use up to 200 letters, digits, "
                "'.', '_' and '-', not beginning with '.'"
            )
        return self._clients / client_id

    def _files(self, kind: str, client_id: str) -> dict[int, Path]:
        directory = self._path(client_id)
        matches = (_FILE.fullmatch(name) for name in _entries(directory))
        return {int(m[2]): directory / m[0] for m in matches if m and m[1] == kind}

    def _write(self, kind: str, state: PrivateState) -> None:
        for name, tensor in state.tensors.items():
            if not name.startswith(PRIVATE_PREFIX) or tensor.dtype is not torch.float32:
                raise StorageError(
                    f"client {state.client_id!r}: {name} ({tensor.dtype}) is no private state; "
                    f"names begin with {PRIVATE_PREFIX} and tensors are float32"
                )
        if state.version < 0:
            raise StorageError(f"client {state.client_id!r}: version {state.version} is below 0")
        path = self.client_dir(state.client_id) / _file_name(kind, state.version)
        # The file cannot hold its own hash, so its header holds one of the content.
        write_tensors(path, state.tensors, _header(state.client_id, state.version, state.tensors))

    def _read(self, kind: str, client_id: str, version: int) -> PrivateState:
        path = self._path(client_id) / _file_name(kind, version)
        try:
            tensors, header = read_tensors(path)
            if header != _header(client_id, version, tensors):
                raise CorruptFileError("its content does not match its checksum")
        except CorruptFileError as error:
            raise CorruptFileError(
                f"the private state of client {client_id!r} after round {version}, {path}, is "
                f"damaged ({error}); delete the file to go on from an older version, or from none"
            ) from error
        except (StorageError, OSError) as error:
            raise StorageError(f"the private state of client {client_id!r}: {error}") from error
        return PrivateState(client_id, version, tensors)


def _file_name(kind: str, version: int) -> str:
    return f"{kind}.r{version:06d}.safetensors"


def _header(client_id: str, version: int, tensors: Tensors) -> dict[str, str]:
    digest = hashlib.sha256(json.dumps([client_id, version]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"client_id": client_id, "version": str(version), "sha256": digest.hexdigest()}


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {directory}: {error.strerror or error}") from error


def _unlink(path: Path) -> None:
    with storage_errors(path):
        path.unlink(missing_ok=True)


def _delete_tree(path: Path) -> None:
    with storage_errors(path):
        if path.exists():
            shutil.rmtree(path)
