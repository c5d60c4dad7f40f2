"""A folder whose files are the parts of one table."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ReadingConfig
from pfm_llm.data.tables import BadRow, LazyColumns, Table

PARQUET = "Parquet"
_KINDS = {
    ".parquet": PARQUET,
    ".csv": "CSV",
    ".tsv": "TSV",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON"),
}
_SAVED = ("state.json", "dataset_dict.json")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_SHOWN = 8
_REMEDY = "name one of them in data.source, and a file of item texts in data.items"

ReadFile = Callable[[Path, Collection[str], ReadingConfig], Table]


def kind_of(path: Path) -> str | None:
    """The kind of table that the name of a file tells, gzipped or not; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def parts_of(folder: Path) -> tuple[Path, ...]:
    """The parts in a folder and below it, in the order of their names.

    Hidden files, empty files and other files than tables are none. Neither are the files of a
    folder that ``datasets.save_to_disk`` wrote.

    Raises:
        DataError: There are tables of several kinds; the message lists them.
    """
    if not folder.is_dir() or any((folder / name).is_file() for name in _SAVED):
        return ()
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if kind_of(file)
        and file.name not in _DESCRIPTIONS
        and not any(p.startswith(("_", ".")) for p in file.relative_to(folder).parts)
        and file.is_file()
        and file.stat().st_size
    ]
    kinds = dict.fromkeys(kind for file in found if (kind := kind_of(file)))
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds tables of several kinds ({', '.join(kinds)}), so they are no parts of "
            f"one: {_listed(folder, found)}; {_REMEDY}"
        )
    return tuple(found)


def read_parts(
    path: Path,
    files: Sequence[Path],
    names: Collection[str],
    reading: ReadingConfig,
    read: ReadFile,
) -> Table:
    """Read text files, one after another, as one table.

    The first part tells the separator. A header may stand in each part or in the first one alone.
    Parts of separated fields have the same columns; JSON objects may lack some.

    Args:
        path: Their name in messages.
        files: At least one, of one kind.
        names: Column names that the config gives.
        reading: What is not to be inferred.
        read: Reads one file.

    Raises:
        DataError: A part cannot be read, or has other columns than the first.
    """
    first = read(files[0], names, reading)
    separator = first.layout.get("separator")
    alike = reading.model_copy(update={"separator": separator})
    rest = [read(file, {*names, *first.header}, alike) for file in files[1:]]
    tables = [first, *(_aligned(table, first, path, files) for table in rest)]
    header = tuple(dict.fromkeys(name for table in tables for name in table.header))
    hidden = {name for table in tables for name in table.passed_over}

    def load(name: str) -> list[str]:
        if name not in header:
            raise KeyError(name)
        return [
            value
            for table in tables
            for value in (
                table.columns[name] if name in table.header else [""] * len(table.positions)
            )
        ]

    joined = _joined(first, tables)
    return replace(
        joined,
        name=str(path),
        header=header,
        columns=LazyColumns([name for name in header if name not in hidden], load),
        inferred=(f"{len(tables)} parts of one table", *first.inferred),
        notes=tuple(dict.fromkeys(note for table in tables for note in table.notes)),
    )


def _joined(first: Table, tables: Sequence[Table]) -> Table:
    """The first part with the positions and the bad rows of all."""
    positions: list[int] = []
    bad: list[BadRow] = []
    starts: list[tuple[int, str]] = []
    start = 0
    for table in tables:
        starts.append((start, table.name))
        positions += [start + at for at in table.positions]
        bad += [row._replace(position=start + row.position) for row in table.bad]
        start = max([start, *positions[-1:], *(row.position for row in bad[-1:])])
    return replace(first, positions=positions, bad=tuple(bad), parts=tuple(starts))


def _aligned(table: Table, first: Table, path: Path, files: Sequence[Path]) -> Table:
    """A part with the columns of the first part; by their order, if it has no header."""
    if "header" not in table.layout:  # JSON
        common = {*table.header} & {*first.header}
        if 2 * len(common) >= min(len(table.header), len(first.header)):
            return table
    elif table.layout["header"]:
        if {*table.header} == {*first.header}:
            return table
    elif len(table.header) == len(first.header):
        columns = zip(first.header, (table.columns[name] for name in table.header), strict=True)
        # What is said of a missing header is said of the first part.
        return replace(table, header=first.header, columns=dict(columns), notes=())
    raise DataError(
        f"{path} holds tables with other columns, so they are no parts of one: {first.name} has "
        f"{', '.join(first.header)}, and {table.name} has {', '.join(table.header)}. The files: "
        f"{_listed(path, files)}; {_REMEDY}"
    )


def _listed(folder: Path, files: Sequence[Path]) -> str:
    shown = ", ".join(str(file.relative_to(folder)) for file in files[:_SHOWN])
    return shown if len(files) <= _SHOWN else f"{shown} and {len(files) - _SHOWN} more"
