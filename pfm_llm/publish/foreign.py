"""Reading a folder that somebody else made, before anything in it is trusted.

Each read is bounded: a file must be a plain one and of at most a given size, a tree must be finite
and shallow, and tensors must have the wanted shapes before they are loaded. Each failure is a typed
error that names the file. A manifest's hash does not replace this: who made the folder made the
manifest too.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CorruptFileError, StorageError
from pfm_llm.protocol.contract import TensorSpec

_MEBI = 1 << 20
MAX_TENSOR_BYTES = 16 << 30
_MAX_HEADER_BYTES = 8 * _MEBI
_MAX_YAML_BYTES = _MEBI >> 3
_MAX_YAML_DEPTH = 32
_CHUNK = 16 * _MEBI
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_CACHE = "blobs"
"""A file of a snapshot in the Hub client's cache is a link into this folder, two levels up."""


@dataclass(frozen=True)
class ForeignFolder:
    """A folder whose content is not trusted.

    Attributes:
        path: The folder.
        origin: The source, for messages.
    """

    path: Path
    origin: str

    def has(self, name: str) -> bool:
        """Whether there is something of this name, of whatever kind."""
        return os.path.lexists(self.path / name)

    def read(self, name: str, limit: int = _MEBI) -> bytes:
        """A file's content.

        Args:
            name: Its path in the folder.
            limit: The largest allowed size, in bytes.

        Raises:
            CorruptFileError: There is no such file, it is no plain file or a link out of the
                folder, or it is larger.
            StorageError: It cannot be read.
        """
        with self._open(name, limit) as file:
            content = file.read(limit + 1)
        if len(content) > limit:  # it grew, or its size is not that of its content
            raise CorruptFileError(self._says(name, f"is larger than {limit:,} bytes"))
        return content

    def sha256(self, name: str, limit: int) -> str:
        """SHA-256 of a file's content, in hex; see `read`."""
        digest, left = hashlib.sha256(), limit
        with self._open(name, limit) as file:
            while (piece := file.read(_CHUNK)) and left >= 0:
                digest.update(piece)
                left -= len(piece)
        if left < 0:
            raise CorruptFileError(self._says(name, f"is larger than {limit:,} bytes"))
        return digest.hexdigest()

    def json(self, name: str, limit: int = _MEBI) -> Any:
        """The tree of a JSON file; see `read` and `files.parse_json`."""
        try:
            return files.parse_json(self.read(name, limit))
        except CorruptFileError as error:
            raise self._named(name, error) from error

    def yaml(self, name: str) -> Any:
        """The tree of a YAML file without aliases, of at most 128 KiB and 32 levels; see `read`.

        An alias names a part of the tree again: a few lines of them make a tree of any size.

        Raises:
            CorruptFileError: It is not such a file.
        """
        content = self.read(name, _MAX_YAML_BYTES)
        try:
            depth = 0
            for event in yaml.parse(content, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent) or depth > _MAX_YAML_DEPTH:
                    raise ValueError("it has an alias, or is nested too deep")
            return yaml.safe_load(content)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CorruptFileError(self._says(name, f"cannot be read: {error}")) from error

    def specs(self, name: str) -> dict[str, TensorSpec]:
        """Shapes and dtypes that the header of a safetensors file states; no tensor is loaded.

        Raises:
            CorruptFileError: The header is damaged, or holds more than tensors.
        """
        with self._open(name, MAX_TENSOR_BYTES) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER_BYTES:
                raise CorruptFileError(self._says(name, "has a header that is too long"))
            start += file.read(length)
        try:
            header = files.tensors_header(start)
        except CorruptFileError as error:
            raise self._named(name, error) from error
        if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
            raise self._unfit(name, "holds more than tensors in its header")
        return {key: self._spec(name, key, entry) for key, entry in header.items()}

    def check(
        self, name: str, found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
    ) -> None:
        """Compare the tensors of a file with those that it must hold.

        Raises:
            ArtefactError: One is missing, too many, or of another shape or dtype.
        """
        for key in sorted(found.keys() | wanted.keys()):
            if key not in wanted or key not in found:
                verb = "lacks" if key in wanted else "holds"
                raise self._unfit(name, f"{verb} {key}, other than the manifest says")
            if found[key] != wanted[key]:
                raise self._unfit(name, f"holds {key} as {found[key]}, expected {wanted[key]}")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file; call it after `check`.

        Raises:
            ArtefactError: A number is not finite.
            CorruptFileError: The file is damaged.
        """
        try:
            tensors = files.parse_tensors(self.read(name, MAX_TENSOR_BYTES))
        except CorruptFileError as error:
            raise self._named(name, error) from error
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise self._unfit(name, f"holds numbers in {key} that are not finite")
        return tensors

    def _spec(self, name: str, key: str, entry: Any) -> TensorSpec:
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise CorruptFileError(self._says(name, f"has no shape for {key!r}"))
        dtype = str(entry.get("dtype"))
        return TensorSpec(tuple(shape), _DTYPES.get(dtype, dtype))

    def _open(self, name: str, limit: int) -> BinaryIO:
        """Open a plain file that is in the folder, or in the Hub client's cache of it."""
        path, root = self.path / name, self.path.resolve()
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(root) and real.parent != root.parent.parent / _HUB_CACHE:
                raise CorruptFileError(self._says(name, "is a link out of the folder"))
            # Without O_NONBLOCK, a pipe at this path would block.
            handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptFileError(self._says(name, "is missing")) from error
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"{self.origin}: cannot read {name}: {reason}") from error
        status = os.fstat(handle)
        plain = stat.S_ISREG(status.st_mode)
        if plain and status.st_size <= limit:
            return os.fdopen(handle, "rb")
        os.close(handle)
        problem = f"is larger than {limit:,} bytes" if plain else "is not a plain file"
        raise CorruptFileError(self._says(name, problem))

    def _says(self, name: str, problem: str) -> str:
        return f"{self.origin}: {name} {problem}; pull or export it again"

    def _unfit(self, name: str, problem: str) -> ArtefactError:
        return ArtefactError(self._says(name, problem))

    def _named(self, name: str, error: CorruptFileError) -> CorruptFileError:
        return CorruptFileError(self._says(name, str(error)))


def texts(tree: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree, including keys, with the dotted key of its place."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, child in tree.items():
            yield key, str(name)
            yield from texts(child, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for child in tree:
            yield from texts(child, key)
