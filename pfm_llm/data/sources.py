"""Interactions from ``data.source``: parsed once, then memory-mapped from a cache."""

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from pfm_llm.base import assets
from pfm_llm.base.errors import CorruptFileError, DataError, StorageError
from pfm_llm.base.files import make_private_dir, sha256_of
from pfm_llm.config.data import (
    EMBEDDED_SOURCES,
    ColumnsConfig,
    DataConfig,
    HubConfig,
    HubTableConfig,
    ReadingConfig,
)
from pfm_llm.data.arrow import FORMAT_VERSION, to_arrow
from pfm_llm.data.arrow import from_arrow as read_cached
from pfm_llm.data.columns import names_in, user_column
from pfm_llm.data.formats import groceries, mind, movielens, recbole
from pfm_llm.data.formats.files import SUFFIXES, files_of, read_table
from pfm_llm.data.formats.format import Format
from pfm_llm.data.formats.hub import HubTable, UserPool, dataset_table, needs, one_split
from pfm_llm.data.interactions import Catalogue, Interactions, build_interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.rows import read_catalogue, validate
from pfm_llm.data.tables import SourceTables, Table

_EMBEDDED, _GROCERIES = EMBEDDED_SOURCES

FORMATS: tuple[Format, ...] = (movielens.FORMAT, recbole.FORMAT, mind.FORMAT)
"""Sources of several files, tried in this order."""

_SAVE_ONE = "set data.hub.split; or save the one you want with save_to_disk, and give that folder"
_LOG = logging.getLogger(__name__)
_LONG_READ = 20_000_000
"""Bytes of files that take more than some seconds to read."""
_SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class _Source:
    """A source that was found but not yet read.

    Attributes:
        files: All files on whose content the result depends.
        columns: The column of each role.
        read: Reads the tables.
        versions: What the result depends on beside files, such as a commit of the Hub.
    """

    files: tuple[Path, ...]
    columns: ColumnsConfig
    read: Callable[[], SourceTables]
    versions: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def load_interactions(config: DataConfig, seed: int) -> tuple[Interactions, LoadReport]:
    """Load ``data.source``.

    The result is kept in the user's cache. Its key is a hash of the source's files and of every
    setting that matters. A damaged entry is built again, with a warning. An entry that cannot be
    written is a warning too: the next load parses the source again.

    Args:
        config: The section ``data``.
        seed: The experiment's seed; matters only with ``max_users``.

    Returns:
        The interactions, and the report of the load.

    Raises:
        DataError: The source is missing, has too many bad rows, or no interaction is left.
        AssetError: The embedded data set cannot be fetched.
    """
    source = _find(config, seed)
    folder = assets.cache_dir() / "interactions" / _cache_key(source, config, seed)
    if folder.exists():
        try:
            return read_cached(folder)
        except CorruptFileError as error:
            _LOG.warning("the cached interactions are damaged and are built again: %s", error)
    size = sum(file.stat().st_size for file in source.files)
    if size >= _LONG_READ:
        _LOG.info("reading %.0f MB of data, once; later runs read what is kept of it", size / 1e6)
    raw = validate(source.read(), source.columns, config.max_bad_rows, config.day_first)
    interactions, report = build_interactions(raw, config, seed)
    report = replace(report, origins=source.origins)
    try:
        make_private_dir(folder.parent)
        to_arrow(interactions, report, folder)
    except StorageError as error:
        _LOG.warning("the interactions could not be cached: %s", error)
    return interactions, report


def read_source(config: DataConfig) -> tuple[SourceTables, ColumnsConfig]:
    """The tables of ``data.source``, read without a cache, and the column of each role.

    Raises:
        DataError: The source is missing or cannot be read.
        AssetError: The embedded data set cannot be fetched.
    """
    source = _find(config)
    return source.read(), source.columns


def load_catalogue(source: str, columns: ColumnsConfig | None = None) -> Catalogue:
    """Load items alone: those of a data source, or of a file of items.

    Args:
        source: ``movielens-100k``, ``completejourney``, a MovieLens folder, or a file with a
            column of ids, one of titles and any further text.
        columns: Names of the first two; recognised when None.

    Raises:
        DataError: The source is missing, or an item has no text.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        columns = columns or ColumnsConfig()
        table = read_table(path, names_in(columns))
        return read_catalogue(table, columns, DataConfig().max_bad_rows)[0]
    return load_interactions(DataConfig(source=source), seed=0)[0].catalogue


def _find(config: DataConfig, seed: int = 0) -> _Source:
    if config.hub is not None:
        return _on_hub(config, config.hub, "data.hub", seed)
    path = Path(config.source).expanduser()
    if config.source == _GROCERIES:
        _check_no_items(config)
        _check_inferred(config, config.source)
        path = assets.completejourney()
        files = tuple(path / name for name in assets.GROCERY_FILES)
        columns = _with_texts(groceries.COLUMNS, config)
        return _Source(files, columns, lambda: groceries.read_groceries(path))
    if config.source == _EMBEDDED:
        path = assets.movielens_100k()
    for kind in FORMATS:
        if files := kind.find(path):
            return _of_format(kind, path, files, config)
    _check_source(config.source, path)
    if _is_on_hub(path):
        return _on_hub(config, HubConfig(name=config.source), "data.source", seed)
    files, read = _locate(config.source, names_in(config.columns), config.reading)
    return _with_items(config, files, lambda: SourceTables(read()))


def _is_on_hub(path: Path) -> bool:
    """Whether a source that is no format of ours is the id of a data set."""
    return not (path.exists() or path.suffix.lower() in SUFFIXES or path.is_absolute())


def _on_hub(config: DataConfig, hub: HubConfig, key: str, seed: int) -> _Source:
    _check_inferred(config, key)
    columns = config.columns
    rows = HubTable(hub, key)
    items = None if hub.items is None else HubTable(hub.items, f"{key}.items")
    tables = (rows,) if items is None else (rows, items)

    def read() -> SourceTables:
        users = None
        if config.max_users is not None:
            users = UserPool(config.max_users, seed, lambda head: user_column(head, columns))
        wanted = needs({*names_in(columns), *(columns.text or ())})
        texts = None if items is None else items.read(wanted=None)
        return SourceTables(rows.read(wanted, users), texts)

    files = tuple(file for table in tables for file in table.files)
    return _of_tables(_with_items(config, files, read), tables)


def _of_tables(source: _Source, tables: Sequence[HubTable]) -> _Source:
    """The source, which also depends on the versions of these tables."""
    origins = tuple(table.origin for table in tables if table.origin is not None)
    return replace(
        source,
        versions=(*(table.version for table in tables), *source.versions),
        origins=(*origins, *source.origins),
    )


def _of_format(kind: Format, path: Path, files: tuple[Path, ...], config: DataConfig) -> _Source:
    _check_inferred(config, f"a source of the kind {kind.name}")
    if kind.columns is not None:
        _check_no_items(config)
        return _Source(files, _with_texts(kind.columns, config), lambda: kind.read(path))
    return _with_items(config, files, lambda: kind.read(path))


def _with_texts(columns: ColumnsConfig, config: DataConfig) -> ColumnsConfig:
    """The columns of a format, with the texts that the config chooses."""
    return columns.model_copy(update={"text": config.columns.text})


def _with_items(
    config: DataConfig, files: tuple[Path, ...], read: Callable[[], SourceTables]
) -> _Source:
    """A source with the items of ``data.items``, if the config names them."""
    _check_items_are_given(config)
    if config.items is None:
        return _Source(files, config.columns, read)
    if _is_on_hub(Path(config.items).expanduser()):
        items = HubTable(HubTableConfig(name=config.items), "data.items")
        source = _Source(
            (*files, *items.files), config.columns, lambda: replace(read(), items=items.read(None))
        )
        return _of_tables(source, (items,))
    more, read_items = _locate(config.items, names_in(config.columns), config.reading.items)
    return _Source((*files, *more), config.columns, lambda: replace(read(), items=read_items()))


def _check_inferred(config: DataConfig, what: str) -> None:
    if given := config.reading.given:
        raise DataError(
            f"data.reading: {what} prescribes how its files are laid out; leave "
            f"{' and '.join(given)} out of data.reading"
        )


def _check_no_items(config: DataConfig) -> None:
    if config.items is not None:
        raise DataError(
            f"data.items: {config.items} cannot be used with {config.source}, which brings its "
            "own item texts; leave data.items out"
        )
    _check_items_are_given(config)


def _check_items_are_given(config: DataConfig) -> None:
    if config.items is None and config.reading.items.given:
        raise DataError(
            "data.reading.items: there is no file of items to read so; name it in data.items, or "
            "leave data.reading.items out"
        )


def _locate(
    place: str, names: Collection[str], reading: ReadingConfig
) -> tuple[tuple[Path, ...], Callable[[], Table]]:
    """The files of one table, and how to read it."""
    path = Path(place).expanduser()
    if files := files_of(path):
        return files, lambda: read_table(path, names, reading)
    if not path.is_dir():
        raise DataError(f"{path} does not exist; check data.source and data.items")
    dataset = _load_saved(path)
    # `datasets` puts its own later results beside the data, as cache-*.
    found = sorted(
        file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-")
    )
    return tuple(found), lambda: _dataset_table(dataset, place)


def _check_source(source: str, path: Path) -> None:
    """Refuse a folder of another kind, and a misspelt name before it is looked up on the Hub."""
    is_saved = any((path / name).is_file() for name in _SAVED_DATASET)
    if path.is_dir() and not is_saved and not files_of(path):
        found = sorted(file.name for file in path.iterdir())[:8]
        raise DataError(
            f"{path} is no folder of {', '.join(kind.name for kind in FORMATS)} or parts of a "
            "table, nor one that datasets.save_to_disk wrote; it holds: "
            f"{', '.join(found) or 'nothing'}. Name one of its files in data.source, and the file "
            "of item texts, if there is one, in data.items"
        )
    nearest = difflib.get_close_matches(source.lower(), EMBEDDED_SOURCES, n=1, cutoff=0.8)
    if nearest and not path.exists():
        raise DataError(f"unknown data.source {source!r}; did you mean {nearest[0]}?")


def _load_saved(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # Arrow, JSON and datasets have errors of their own
        raise DataError(
            f"{path} cannot be read as a folder that datasets.save_to_disk wrote: {error}"
        ) from error


def _dataset_table(dataset: Any, name: str) -> Table:
    rows, notes = one_split(dataset, name, _SAVE_ONE)
    table = dataset_table(rows, name)
    return replace(table, notes=(*notes, *table.notes))


def _cache_key(source: _Source, config: DataConfig, seed: int) -> str:
    """A hash of everything that decides the result, the names in messages included."""
    settings = config.model_dump(
        mode="json",
        include={"source", "items", "repeats", "min_interactions", "max_users", "met_items_only"}
        | {"max_bad_rows", "reading", "day_first", "hub"},
    )
    parts = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "columns": source.columns.model_dump(mode="json"),
        "seed": None if config.max_users is None else seed,
        "versions": source.versions,
        "files": [(file.name, sha256_of(file)) for file in source.files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
