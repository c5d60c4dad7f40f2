"""Tables of text that know the line of each row: from CSV, TSV, Parquet and `datasets`."""

import csv
import difflib
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pfm_llm.base.errors import DataError


class BadRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        position: Its line in the file from 1 (the header is line 1), or its row from 1.
        reason: The kind of fault, by which rows are counted.
        detail: The fault of this row, such as ``"1 fields, expected 2"``.
    """

    position: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Table:
    """Columns of stripped text.

    Attributes:
        name: The file or data set, for messages.
        header: All columns of the source, also those that were not read.
        columns: Column name to one string per row, ``""`` where there is none.
        positions: Line or row of each row in the source, from 1.
        unit: The unit of ``positions``: ``"line"`` or ``"row"``.
        bad: Rows that do not fit the header, such as those with too few fields.
    """

    name: str
    header: tuple[str, ...]
    columns: Mapping[str, list[str]]
    positions: Sequence[int]
    unit: str = "line"
    bad: tuple[BadRow, ...] = ()

    @property
    def num_rows(self) -> int:
        """All rows, good and bad."""
        return len(self.positions) + len(self.bad)

    def column(self, name: str, key: str | None = None, hint: str = "") -> list[str]:
        """The column ``name``.

        Args:
            name: A column.
            key: The config key that names it; None: the format of the file names it.
            hint: Another remedy, for the message.

        Raises:
            DataError: There is no such column; the message names it, the key, all columns and
                the nearest one.
        """
        if name in self.columns:
            return self.columns[name]
        there = f"its columns: {', '.join(self.header)}"
        if key is None:
            raise DataError(f"{self.name} has no column {name!r}; {there}; is the file whole?")
        nearest = _nearest(name, self.header)
        remedy = f": {nearest} (the nearest)" if nearest else " to one of them"
        raise DataError(
            f"{self.name} has no column {name!r} ({key}); {there}; set {key}{remedy}"
            + (f", {hint}" if hint else "")
        )


@dataclass(frozen=True)
class Layout:
    """The layout of a text file.

    Attributes:
        separator: Between fields; may be several characters unless ``quoted``.
        header: The columns; None: the first line names them.
        quoted: Fields may be quoted as in RFC 4180, so a row can span lines.
        latin1: Read as Latin-1 where the file is not UTF-8.
    """

    separator: str
    header: tuple[str, ...] | None = None
    quoted: bool = False
    latin1: bool = False


CSV = Layout(",", quoted=True)
TSV = Layout("\t")
"""Without quoting: a title may begin with a quotation mark."""

_LAYOUTS = {".csv": CSV, ".tsv": TSV}
_PARQUET = ".parquet"
TABLE_SUFFIXES = (*_LAYOUTS, _PARQUET)


def read_table(path: Path, wanted: Collection[str] | None = None) -> Table:
    """Read a CSV, TSV or Parquet file.

    Args:
        path: The file; its suffix tells the format.
        wanted: Read only these columns, as far as they exist; None: all.

    Raises:
        DataError: The file is missing, empty, of another kind or cannot be decoded.
    """
    suffix = path.suffix.lower()
    if suffix == _PARQUET:
        _check_file(path)
        try:
            header = tuple(pq.read_schema(path).names)
            columns = None if wanted is None else [name for name in header if name in wanted]
            content = pq.ParquetFile(path).read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from error
        return from_arrow_table(str(path), content, header)
    if suffix not in _LAYOUTS:
        raise DataError(
            f"{path}: unknown kind of file {suffix!r}; a table is one of "
            f"{', '.join(TABLE_SUFFIXES)}"
        )
    return read_delimited(path, _LAYOUTS[suffix], wanted)


def read_delimited(path: Path, layout: Layout, wanted: Collection[str] | None = None) -> Table:
    """Read a text file whose rows are lines; see `read_table`. Blank lines are skipped."""
    records = _records(path, _decode(path, layout.latin1), layout)
    header = layout.header
    if header is None:
        _, first = next(records, (0, None))
        if not isinstance(first, list):
            raise DataError(f"{path} is empty; its first line must name the columns")
        header = tuple(name.strip() for name in first)
    _check_header(path, header)
    rows: list[list[str]] = []
    positions: list[int] = []
    bad: list[BadRow] = []
    for line, fields in records:
        if isinstance(fields, str):
            bad.append(BadRow(line, "malformed quotes", fields))
        elif len(fields) != len(header):
            detail = f"{len(fields)} fields, expected {len(header)}"
            bad.append(BadRow(line, "wrong number of fields", detail))
        else:
            rows.append(fields)
            positions.append(line)
    columns = {
        name: [row[index].strip() for row in rows]
        for index, name in enumerate(header)
        if wanted is None or name in wanted
    }
    return Table(str(path), header, columns, positions, bad=tuple(bad))


def from_arrow_table(name: str, content: pa.Table, header: Sequence[str]) -> Table:
    """A `Table` of an Arrow table; nulls and NaN become ``""``, lists are joined by commas.

    Args:
        name: For messages.
        content: The columns that were read.
        header: All columns of the source.

    Raises:
        DataError: A column cannot be read as text, or two columns have one name.
    """
    _check_header(name, tuple(header))
    columns = {}
    for column in content.column_names:
        try:
            columns[column] = _as_text(content.column(column))
        except pa.ArrowException as error:
            raise DataError(
                f"{name}: column {column!r} of type {content.schema.field(column).type} cannot "
                "be read as text; leave it out of the file"
            ) from error
    return Table(name, tuple(header), columns, range(1, content.num_rows + 1), unit="row")


def _records(path: Path, text: str, layout: Layout) -> Iterator[tuple[int, list[str] | str]]:
    """The line at which each row begins, with its fields, or with the fault of its quotes."""
    if not layout.quoted:
        for line, content in enumerate(text.split("\n"), start=1):
            if content.strip():
                yield line, content.rstrip("\r").split(layout.separator)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=layout.separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # the rest of the file is inside the quotes
                raise DataError(
                    f"{path} line {line}: a quotation mark that is never closed; close it, or "
                    'write quotation marks inside a quoted field as ""'
                ) from error
            yield line, str(error)
            continue
        if fields:
            yield line, fields


def _decode(path: Path, latin1: bool) -> str:
    _check_file(path)
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if latin1:
            return content.decode("latin-1")
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {state}; check data.source and data.items")


def _check_header(name: Path | str, header: tuple[str, ...]) -> None:
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise DataError(f"{name}: column {min(twice)!r} comes twice; rename one of them")


def _nearest(name: str, header: Sequence[str]) -> str | None:
    folded = {re.sub("[_ -]", "", column.lower()): column for column in header}
    matches = difflib.get_close_matches(re.sub("[_ -]", "", name.lower()), folded, 1, cutoff=0.5)
    return folded[matches[0]] if matches else None


def _as_text(column: Any) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), ", ")
    elif pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        # Whole numbers with gaps are stored as floats: an id 1.0 is 1.
        if pc.all(pc.equal(pc.floor(column), column), min_count=0).as_py():
            column = column.cast(pa.int64(), safe=False)
    return [value.strip() if value else "" for value in column.cast(pa.string()).to_pylist()]
