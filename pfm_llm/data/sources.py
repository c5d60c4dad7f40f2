"""Interactions from ``data.source``: parsed once, then memory-mapped from a cache."""

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from pfm_llm.base import assets
from pfm_llm.base.errors import CorruptFileError, DataError, StorageError
from pfm_llm.base.files import make_private_dir, sha256_of
from pfm_llm.config.schema import ColumnsConfig, DataConfig
from pfm_llm.data import groceries, movielens
from pfm_llm.data.arrow import FORMAT_VERSION, from_arrow, to_arrow
from pfm_llm.data.interactions import Catalogue, Interactions, build_interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.rows import SourceTables, read_catalogue, validate
from pfm_llm.data.tables import TABLE_SUFFIXES, Table, from_arrow_table, read_table

EMBEDDED = "movielens-100k"
GROCERIES = "completejourney"
EMBEDDED_SOURCES = (EMBEDDED, GROCERIES)
"""The sources that pfm_llm fetches by itself."""

_LOG = logging.getLogger(__name__)
_SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class _Source:
    """A source that was found but not yet read.

    Attributes:
        files: All files on whose content the result depends.
        columns: The column of each role.
        read: Reads the tables.
    """

    files: tuple[Path, ...]
    columns: ColumnsConfig
    read: Callable[[], SourceTables]


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
    source = _find(config)
    folder = assets.cache_dir() / "interactions" / _cache_key(source, config, seed)
    if folder.exists():
        try:
            return from_arrow(folder)
        except CorruptFileError as error:
            _LOG.warning("the cached interactions are damaged and are built again: %s", error)
    raw = validate(source.read(), source.columns, config.max_bad_rows)
    interactions, report = build_interactions(raw, config, seed)
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
    """Load items alone: those of a data source, or of a CSV, TSV or Parquet file of items.

    Args:
        source: ``movielens-100k``, ``completejourney``, a MovieLens folder, or a file with a
            column of ids, one of titles and any further text.
        columns: Names of the first two; ``item_id`` and ``title`` when None.

    Raises:
        DataError: The source is missing, or an item has no text.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in TABLE_SUFFIXES:
        bad_rows_allowed = DataConfig().max_bad_rows
        return read_catalogue(read_table(path), columns or ColumnsConfig(), bad_rows_allowed)[0]
    return load_interactions(DataConfig(source=source), seed=0)[0].catalogue


def _find(config: DataConfig) -> _Source:
    path = Path(config.source).expanduser()
    if config.source == GROCERIES:
        _check_no_items(config)
        path = assets.completejourney()
        files = tuple(path / name for name in assets.GROCERY_FILES)
        return _Source(files, groceries.COLUMNS, lambda: groceries.read_groceries(path))
    if config.source == EMBEDDED:
        path = assets.movielens_100k()
    if path.is_dir() and (files := movielens.movielens_files(path)):
        _check_no_items(config)
        return _Source(files, movielens.COLUMNS, lambda: movielens.read_movielens(path))
    _check_source(config.source, path)
    places = [config.source] if config.items is None else [config.source, config.items]
    located = [_locate(place) for place in places]
    return _Source(
        files=tuple(file for files, _ in located for file in files),
        columns=config.columns,
        read=lambda: _read_tables(config.columns, [read for _, read in located]),
    )


def _check_no_items(config: DataConfig) -> None:
    if config.items is not None:
        raise DataError(
            f"data.items: {config.items} cannot be used with {config.source}, which brings its "
            "own item texts; leave data.items out"
        )


_Reader = Callable[[Collection[str] | None], tuple[Table, tuple[str, ...]]]
"""Reads the wanted columns (None: all) of one table; returns the table and notes on it."""


def _read_tables(columns: ColumnsConfig, readers: list[_Reader]) -> SourceTables:
    wanted = {columns.user, columns.item, columns.timestamp, columns.rating}
    if len(readers) == 1:
        wanted.add(columns.title)
    rows, notes = readers[0]({name for name in wanted if name is not None})
    if len(readers) == 1:
        return SourceTables(rows, notes=notes)
    items, more_notes = readers[1](None)
    return SourceTables(rows, items, notes=(*notes, *more_notes))


def _locate(place: str) -> tuple[tuple[Path, ...], _Reader]:
    """The files of one table, and how to read it."""
    path = Path(place).expanduser()
    if path.is_file():
        return (path,), lambda wanted: (read_table(path, wanted), ())
    if path.is_dir():
        dataset = _load_saved(path)
        # `datasets` puts its own later results beside the data, as cache-*.
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not file.name.startswith("cache-")
        )
    else:
        if path.suffix.lower() in TABLE_SUFFIXES or path.is_absolute():
            raise DataError(f"{path} does not exist; check data.source and data.items")
        dataset = _load_from_hub(place)
        files = [Path(file["filename"]) for file in _one_split(dataset, place)[0].cache_files]
    return tuple(files), lambda wanted: _dataset_table(dataset, place, wanted)


def _check_source(source: str, path: Path) -> None:
    """Refuse a folder of another kind, and a misspelt name before it is looked up on the Hub."""
    if path.is_dir() and not any((path / name).is_file() for name in _SAVED_DATASET):
        found = sorted(file.name for file in path.iterdir())[:8]
        raise DataError(
            f"{path} is neither a MovieLens folder (ratings.csv + movies.csv, ratings.dat + "
            "movies.dat, u.data + u.item) nor one that datasets.save_to_disk wrote; it holds: "
            f"{', '.join(found) or 'nothing'}. For a CSV, TSV or Parquet file, name the file"
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


def _load_from_hub(name: str) -> Any:
    try:
        return datasets.load_dataset(name)
    except Exception as error:  # the Hub, the network and each loader have their own
        raise DataError(
            f"{name!r} is no file or folder here, and datasets.load_dataset cannot load it "
            f"({type(error).__name__}: {error}). Either the path is wrong, or the id is unknown, "
            "or there is no network: save the data set with save_to_disk where there is one, "
            "and give that folder as data.source"
        ) from error


def _one_split(dataset: Any, name: str) -> tuple[Any, tuple[str, ...]]:
    """The split ``train``, or the only one; the note names the splits that are not read."""
    if not isinstance(dataset, dict):
        return dataset, ()
    split = next(iter(dataset)) if len(dataset) == 1 else "train"
    if split not in dataset:
        raise DataError(
            f"{name} has the splits {', '.join(dataset)} and no split 'train'; save the one you "
            "want with save_to_disk, and give that folder"
        )
    others = [other for other in dataset if other != split]
    note = f"{name}: only the split {split!r} is read, not {', '.join(others)}"
    return dataset[split], (note,) if others else ()


def _dataset_table(
    dataset: Any, name: str, wanted: Collection[str] | None
) -> tuple[Table, tuple[str, ...]]:
    rows, notes = _one_split(dataset, name)
    header = tuple(rows.column_names)
    names = [column for column in header if wanted is None or column in wanted]
    content = rows.select_columns(names).with_format("arrow")[:]
    return from_arrow_table(name, content, header), notes


def _cache_key(source: _Source, config: DataConfig, seed: int) -> str:
    """A hash of everything that decides the result, the names in messages included."""
    settings = config.model_dump(
        mode="json",
        include={"source", "items", "repeats", "min_interactions", "max_users", "max_bad_rows"},
    )
    parts = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "columns": source.columns.model_dump(mode="json"),
        "seed": None if config.max_users is None else seed,
        "files": [(file.name, sha256_of(file)) for file in source.files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
