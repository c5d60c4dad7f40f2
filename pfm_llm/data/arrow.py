"""Interactions on disk: a folder of memory-mapped `datasets` tables, whole or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.files import read_json, sha256_of, storage_errors, write_json
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.report import LoadReport

FORMAT_VERSION = 4
"""Raise it when the stored layout changes, or the parsing of a source."""

_MANIFEST = "manifest.json"
_FIELD = "field."


def to_arrow(interactions: Interactions, report: LoadReport, folder: Path) -> None:
    """Store ``interactions`` and ``report`` as ``folder``, and replace an older one in one step.

    The folder is readable by its owner alone and holds ``interactions``, ``users`` and
    ``items``, each loadable with ``datasets.load_from_disk``, and a manifest with the report and
    the SHA-256 of every file. Its parents are created.

    Raises:
        DiskSpaceError: The disk is full; nothing half-written was left behind.
        StorageError: Any other failure to write.
    """
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _write(interactions, report, temporary)
            _swap_in(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def from_arrow(folder: Path) -> tuple[Interactions, LoadReport]:
    """The interactions and the report that `to_arrow` stored.

    Raises:
        CorruptFileError: The folder is missing, incomplete, of another format version, or a
            file does not match its checksum.
    """
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format_version"] != FORMAT_VERSION:
            raise CorruptFileError(f"{folder} is not of format version {FORMAT_VERSION}; delete it")
        # Before Arrow maps the files: damaged offsets in a mapped file can crash a process.
        for name, sha256 in manifest["files"].items():
            if sha256_of(folder / name) != sha256:
                raise CorruptFileError(
                    f"{folder / name} does not match its recorded checksum; delete {folder}"
                )
        report = manifest["report"]
        tuples = {name: tuple(report[name]) for name in ("examples", "notes", "origins")}
        return _read(folder), LoadReport(**{**report, **tuples})
    except (OSError, AttributeError, KeyError, ValueError, TypeError, DataError) as error:
        raise CorruptFileError(f"{folder} cannot be read ({error}); delete it") from error


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """A block in which `datasets` draws no progress bars."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _write(interactions: Interactions, report: LoadReport, folder: Path) -> None:
    rows: dict[str, Any] = {"item": interactions.items}
    if interactions.timestamps is not None:
        rows["timestamp"] = interactions.timestamps
    if interactions.ratings is not None:
        rows["rating"] = interactions.ratings
    users = {"id": interactions.user_ids, "length": np.diff(interactions.offsets)}
    catalogue = interactions.catalogue
    tables: dict[str, dict[str, Any]] = {
        "interactions": rows,
        "users": users | _with_prefix(interactions.user_fields),
        "items": {"id": catalogue.item_ids} | _with_prefix(catalogue.fields),
    }
    with no_progress_bars():
        for name, columns in tables.items():
            table = datasets.Dataset.from_dict(columns)
            # An empty table left to itself gets no file, and then does not load.
            table.save_to_disk(str(folder / name), num_shards=1)
    write_json(
        folder / _MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "files": {
                str(path.relative_to(folder)): sha256_of(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
            "report": asdict(report),
        },
    )


def _read(folder: Path) -> Interactions:
    rows = _columns(folder / "interactions")
    users = _columns(folder / "users")
    items = _columns(folder / "items")
    return Interactions(
        catalogue=Catalogue(tuple(items["id"].to_pylist()), _without_prefix(items)),
        user_ids=tuple(users["id"].to_pylist()),
        offsets=np.concatenate([[0], np.cumsum(users["length"].to_numpy())]),
        items=rows["item"].to_numpy(),
        timestamps=rows["timestamp"].to_numpy() if "timestamp" in rows else None,
        ratings=rows["rating"].to_numpy() if "rating" in rows else None,
        user_fields=_without_prefix(users),
    )


def _columns(folder: Path) -> dict[str, Any]:
    table = datasets.load_from_disk(str(folder)).data
    return dict(zip(table.column_names, table.columns, strict=True))


def _with_prefix(fields: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {f"{_FIELD}{name}": values for name, values in fields.items()}


def _without_prefix(columns: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        name.removeprefix(_FIELD): tuple(column.to_pylist())
        for name, column in columns.items()
        if name.startswith(_FIELD)
    }


def _swap_in(temporary: Path, folder: Path) -> None:
    """Rename onto ``folder``; an older folder is moved aside first, then removed."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process may have put its own whole folder here since then: that one stands.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
