"""Text files whose rows are lines of separated fields, and what their first lines tell of them."""

import csv
import io
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ReadingConfig
from pfm_llm.data.columns import is_usual, untyped
from pfm_llm.data.formats.content import decode, read_content
from pfm_llm.data.tables import BadRow, Table, check_header
from pfm_llm.data.times import DATES, NUMBERS, parse_times

_SEPARATORS = {"::": "'::'", "\t": "tab", ",": "','", ";": "';'", "|": "'|'"}
_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_RFC_4180 = (",", ";")
"""With these, quotation marks are always those of RFC 4180; elsewhere the lines must show it."""

_SEPARATOR_LINE = re.compile(r"sep=(.)(?=[\r\n])", re.IGNORECASE)
"""As spreadsheets write it before the header."""

_SAMPLE = 200  # lines
_SHOWN = 60  # characters
_STEADY = 0.9
_MOST_RATINGS = 21
_HIGHEST_RATING = 100
_ASIN = re.compile(r"(?:B0|\d\d)[0-9A-Z]{8}")


@dataclass(frozen=True)
class Layout:
    """The layout of a text file.

    Attributes:
        separator: Between fields; may be several characters unless ``quoted``.
        header: The columns; None: the first line names them.
        quoted: Fields may be quoted as in RFC 4180, so a row can span lines.
        escaped: Inside quotes a backslash stands before a quotation mark.
    """

    separator: str
    header: tuple[str, ...] | None = None
    quoted: bool = False
    escaped: bool = False


INFERRED = ReadingConfig()
CSV = Layout(",", quoted=True)
TSV = Layout("\t")
"""Without quoting: a title may begin with a quotation mark."""


def read_delimited(path: Path, layout: Layout) -> Table:
    """Read a text file of a known layout. Blank lines are skipped.

    Raises:
        DataError: The file is missing, empty or damaged, or two columns have one name.
    """
    return _parse(path, *decode(path, read_content(path)), layout)


def read_unknown(
    path: Path, content: tuple[str, str], names: Collection[str], reading: ReadingConfig
) -> Table:
    """Read a text whose layout its first lines tell.

    Args:
        path: The file; the suffix counts where the lines leave it open.
        content: Its text, and the name of the encoding.
        names: Column names that the config gives.
        reading: What is not to be inferred.

    Raises:
        DataError: The file is empty or damaged, two columns have one name, or the separator that
            ``reading`` gives stands in no line.
    """
    text, encoding = content
    if (said := _SEPARATOR_LINE.match(text)) is not None:  # its line stays, as a blank one
        text = text[said.end() :]
        reading = reading.model_copy(update={"separator": reading.separator or said[1]})
    filled = (line.rstrip("\n") for line in io.StringIO(text, newline=None) if line.strip())
    lines = list(itertools.islice(filled, _SAMPLE))
    if not lines:
        raise DataError(f"{path} is empty; its first line must name the columns")
    suffix = next((s for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()
    if reading.separator is None:
        layout = _sniffed(lines, _SUFFIXES.get(suffix), names)
    elif any(reading.separator in line for line in lines):
        layout = _with_quotes(lines, reading.separator)
    else:
        raise DataError(
            f"{path}: data.reading.separator {reading.separator!r} stands in none of its first "
            f"lines, such as {lines[0][:_SHOWN]!r}; change it, or leave it out to have it inferred"
        )
    has_header = reading.header
    if has_header is None:
        has_header = _has_header(lines, layout, names)
    header = None if has_header else _named_by_content(lines, layout, names)
    table = _parse(path, text, encoding, replace(layout, header=header))
    if header is None or reading.header is False:
        return table
    guess = f"{path}: no header; its columns are taken as {', '.join(header)}"
    return replace(table, notes=(*table.notes, guess))


def _parse(path: Path, text: str, encoding: str, layout: Layout) -> Table:
    records = _records(path, text, layout)
    header = layout.header
    if header is None:
        _, first = next(records, (0, None))
        if not isinstance(first, list):
            raise DataError(f"{path} is empty; its first line must name the columns")
        header = _untyped([name.strip() for name in first])
    names = tuple(filter(None, header))  # an index that pandas wrote has no name
    check_header(str(path), names)
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
    columns = {n: [row[at].strip() for row in rows] for at, n in enumerate(header) if n}
    inferred = (
        f"separator {_SEPARATORS.get(layout.separator, layout.separator)}",
        "fields in quotation marks are unquoted" if layout.quoted else "no quotation marks",
        f"no header, columns named {', '.join(header)}" if layout.header else "header in line 1",
        f"encoding {encoding}",
    )
    told = {
        "separator": layout.separator, "encoding": encoding, "header": layout.header is None
    }  # fmt: skip
    is_utf = encoding.lower().startswith("utf")
    notes = () if is_utf else (f"{path}: not UTF-8, read as {encoding}",)
    return Table(str(path), names, columns, positions, "line", tuple(bad), inferred, told, notes)


def _untyped(header: Sequence[str]) -> tuple[str, ...]:
    """The names of a header, without the types of RecBole if all have one."""
    plain = tuple(map(untyped, header))
    return plain if all(a != b for a, b in zip(plain, header, strict=True)) else tuple(header)


def _records(path: Path, text: str, layout: Layout) -> Iterator[tuple[int, list[str] | str]]:
    """The line at which each row begins, with its fields, or with the fault of its quotes."""
    if not layout.quoted:
        for line, content in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
            if content.strip():
                yield line, content.rstrip("\r").split(layout.separator)
        return
    escape = "\\" if layout.escaped else None
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=layout.separator, strict=True, escapechar=escape
    )
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


def _sniffed(lines: Sequence[str], preferred: str | None, names: Collection[str]) -> Layout:
    """The layout under which most lines have as many fields as the first one."""
    found: list[tuple[tuple[bool, bool, bool, bool, int], Layout]] = []
    for separator in _SEPARATORS:
        layout = _with_quotes(lines, separator)
        rows = [_fields(line, layout) for line in lines]
        width = len(rows[0])
        share = sum(len(row) == width for row in rows) / len(rows)
        known = any(_is_name(cell, names) for cell in _untyped(rows[0]))
        is_long = len(separator) > 1  # stands by chance in no line
        key = (known, share >= _STEADY, known and separator == preferred, is_long, width)
        if width > 1:
            found.append((key, layout))
    default = _with_quotes(lines, preferred or ",")
    return max(found, key=lambda entry: entry[0])[1] if found else default


def _fields(line: str, layout: Layout) -> list[str]:
    if not layout.quoted:
        return [field.strip() for field in line.split(layout.separator)]
    escape = "\\" if layout.escaped else None
    try:
        row = next(csv.reader([line], delimiter=layout.separator, escapechar=escape), [])
    except csv.Error:  # a field that is longer than csv allows
        row = line.split(layout.separator)
    return [field.strip() for field in row]


def _with_quotes(lines: Sequence[str], separator: str) -> Layout:
    if len(separator) > 1:
        return Layout(separator)
    mark = re.escape(separator)
    is_escaped = any(re.search(rf'[^{mark}\\]\\"(?!{mark}|$)', line) for line in lines)
    escaped = is_escaped and not any(re.search(rf'[^{mark}"]""[^{mark}"]', line) for line in lines)
    quoted = separator in _RFC_4180 or _shows_quoting(lines, separator)
    return Layout(separator, quoted=quoted, escaped=quoted and escaped)


def _shows_quoting(lines: Sequence[str], separator: str) -> bool:
    """Whether quotation marks enclose fields, so that they are no part of a text.

    They do if they stand in a whole column, if those inside a field are doubled, or if fewer rows
    are torn by it.
    """
    if not any('"' in line for line in lines):
        return False
    rows = [line.split(separator) for line in lines]
    whole = [row for row in rows if len(row) == len(rows[0])]
    columns = [[field for field in column if field] for column in zip(*whole, strict=True)]
    stretches = [fields for column in columns for fields in (column, column[1:]) if fields]
    num_torn = _num_torn(lines, separator, len(rows[0]))
    if any(all(map(_is_enclosed, fields)) for fields in stretches):
        return num_torn < len(lines)
    doubled = any(_is_enclosed(field) and '""' in field[1:-1] for row in whole for field in row)
    return num_torn < len(rows) - len(whole) + doubled


def _num_torn(lines: Sequence[str], separator: str, width: int) -> int:
    """How many rows have another number of fields if quotation marks enclose fields."""
    escaped = any('\\"' in line for line in lines)
    layout = Layout(separator, quoted=True, escaped=escaped)
    count = last = 0
    try:
        for line, fields in _records(Path(), "\n".join(lines), layout):
            last = line
            count += isinstance(fields, str) or len(fields) != width
    except DataError:  # a field goes on to the end of the sample, as the last one may
        return count if last >= _STEADY * len(lines) else len(lines)
    return count


def _is_enclosed(field: str) -> bool:
    """Whether a field is in quotation marks, and those inside it are doubled or escaped."""
    if len(field) < 2 or not (field[0] == field[-1] == '"'):
        return False
    return '"' not in field[1:-1].replace('""', "").replace('\\"', "")


def _has_header(lines: Sequence[str], layout: Layout, names: Collection[str]) -> bool:
    """Whether the first line names the columns: by a usual name, or as text above numbers."""
    first, *rest = (_fields(line, layout) for line in lines)
    if any(_is_name(cell, names) for cell in _untyped(first)):
        return True
    columns = zip(*(row for row in rest if len(row) == len(first)), strict=True)
    for cell, values in zip(first, columns, strict=False):
        if cell and not _is_value(cell) and all(map(_is_value, values)):
            return True
    return not any(map(_is_value, first))


def _is_name(cell: str, names: Collection[str]) -> bool:
    return cell in names or is_usual(cell)


def _is_value(text: str) -> bool:
    return parse_times([text]).values[0] is not None


def _named_by_content(
    lines: Sequence[str], layout: Layout, asked: Collection[str]
) -> tuple[str, ...]:
    """Names for the columns of a table without a header, usual ones where the content is clear.

    If the config asks for columns by their number, all of them have a number alone.
    """
    rows = [_fields(line, layout) for line in lines]
    width = len(rows[0])
    columns = [*zip(*(row for row in rows if len(row) == width), strict=True)]
    names = {at: f"column_{at + 1}" for at in range(width)}
    if set(names.values()) & set(asked):
        return tuple(names.values())
    times = [at for at in range(width) if _are_times(columns[at])]
    rest = [at for at in range(width) if at not in times[-1:]]
    if times:
        names[times[-1]] = "timestamp"
        ratings = [at for at in rest[2:] if _are_ratings(columns[at])]
        texts = [at for at in rest[2:] if not any(map(_is_value, columns[at]))]
        names |= dict.fromkeys(ratings[:1], "rating") | dict.fromkeys(texts[:1], "title")
        if len(rest) > 1:
            pair = ("user_id", "item_id")
            if all(map(_ASIN.fullmatch, columns[rest[0]])) and not all(
                map(_ASIN.fullmatch, columns[rest[1]])
            ):  # as in Amazon's ratings of 2018
                pair = ("item_id", "user_id")
            names |= dict(zip(rest, pair, strict=False))
    elif width > 1 and len(set(columns[0])) == len(rows):
        texts = [at for at in range(1, width) if not any(map(_is_value, columns[at]))]
        names |= {0: "item_id"} | dict.fromkeys(texts[:1], "title")
    return tuple(names[at] for at in range(width))


def _are_times(values: Sequence[str]) -> bool:
    times = parse_times(values)
    small = ("decimal years", "days", NUMBERS)
    return None not in times.values and (times.unit == DATES or times.unit not in small)


def _are_ratings(values: Sequence[str]) -> bool:
    numbers = parse_times(values).values
    found = {value for value in numbers if value is not None}
    return (
        None not in numbers
        and len(found) <= _MOST_RATINGS
        and all(-_HIGHEST_RATING <= value <= _HIGHEST_RATING for value in found)
    )
