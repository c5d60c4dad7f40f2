"""The usable rows of tables of text. A bad row is counted and shown with its position."""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.config.schema import ColumnsConfig
from pfm_llm.data.interactions import TITLE, Catalogue, RawInteractions
from pfm_llm.data.tables import BadRow, Table

_MAX_EXAMPLES = 5
_MAX_INTEGER = 2**63

NO_TEXT = "item without text"
NOT_A_TIME = "timestamp is neither a number nor an ISO 8601 date"
NOT_A_RATING = "rating is not a number"

Number = int | float

_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")


@dataclass(frozen=True)
class SourceTables:
    """The tables of one source.

    Attributes:
        interactions: One row per interaction, in order.
        items: Item id, title and further text columns; None: titles are in ``interactions``.
        users: User id and further columns; None: users have no fields.
        notes: For the report.
    """

    interactions: Table
    items: Table | None = None
    users: Table | None = None
    notes: tuple[str, ...] = ()


def validate(tables: SourceTables, columns: ColumnsConfig, max_bad_rows: float) -> RawInteractions:
    """Keep the usable rows, and count the others.

    Args:
        tables: The tables of the source.
        columns: The column of each role.
        max_bad_rows: Highest share of bad rows, of each table.

    Raises:
        DataError: A column is missing, or a table has more bad rows than allowed; the message
            names file, line and reason of the first ones.
    """
    rows, notes = tables.interactions, list(tables.notes)
    if tables.items is not None:
        catalogue, item_notes = read_catalogue(tables.items, columns, max_bad_rows)
    else:
        catalogue, item_notes = _catalogue_of_rows(rows, columns)
    notes += item_notes
    user_fields: dict[str, dict[str, str]] = {}
    if tables.users is not None:
        user_fields, user_notes = _user_fields(tables.users, columns, max_bad_rows)
        notes += user_notes
    users = rows.column(columns.user, "data.columns.user")
    code_of = {item: code for code, item in enumerate(catalogue.item_ids)}
    codes = [code_of.get(item) for item in rows.column(columns.item, "data.columns.item")]
    times = _parse(rows, columns.timestamp, "timestamp", "the rows are in order", _time)
    ratings = _parse(rows, columns.rating, "rating", "there are none", _number)
    bad = _first_faults(
        *rows.bad,
        *_without_value(rows, users, "empty user id"),
        *_without_value(rows, rows.columns[columns.item], "empty item id"),
        *_without_value(rows, times, NOT_A_TIME, columns.timestamp),
        *_without_value(rows, ratings, NOT_A_RATING, columns.rating),
        *_without_value(rows, codes, NO_TEXT, columns.item),
    )
    _check_share(rows, bad, max_bad_rows)
    faulty = {fault.position for fault in bad}
    kept = [index for index, at in enumerate(rows.positions) if at not in faulty]
    return RawInteractions(
        catalogue=catalogue,
        users=[users[index] for index in kept],
        items=np.array([codes[index] for index in kept], dtype=np.int64),
        timestamps=_select(times, kept),
        ratings=_select(ratings, kept),
        user_fields=user_fields,
        num_bad=_count(bad),
        examples=_examples(rows, bad),
        notes=tuple(notes),
    )


def read_catalogue(
    table: Table, columns: ColumnsConfig, max_bad_rows: float
) -> tuple[Catalogue, list[str]]:
    """The items of a table, the first of equal ids, and notes on the rows left out.

    Raises:
        DataError: A column is missing, or more rows than allowed have no id or no text.
    """
    ids = table.column(columns.item, "data.columns.item")
    texts = {TITLE: _one_line(table.column(columns.title, "data.columns.title"))}
    reserved = {columns.item, columns.title, TITLE}
    texts |= {
        name: _one_line(values) for name, values in table.columns.items() if name not in reserved
    }
    bad = [
        *table.bad,
        *_without_value(table, ids, "empty item id"),
        *_without_value(table, texts[TITLE], NO_TEXT),
    ]
    _check_share(table, bad, max_bad_rows)
    faulty = {fault.position for fault in bad}
    first: dict[str, int] = {}
    good = [index for index, position in enumerate(table.positions) if position not in faulty]
    for index in good:
        first.setdefault(ids[index], index)
    kept = list(first.values())
    fields = {name: tuple(values[index] for index in kept) for name, values in texts.items()}
    return Catalogue(tuple(first), fields), _table_notes(table, bad, len(good) - len(kept))


def _catalogue_of_rows(table: Table, columns: ColumnsConfig) -> tuple[Catalogue, list[str]]:
    """The first title that the rows give each item."""
    ids = table.column(columns.item, "data.columns.item")
    hint = "or name a file of item texts in data.items"
    titles = _one_line(table.column(columns.title, "data.columns.title", hint))
    first: dict[str, str] = {}
    num_other = 0
    for item, title in zip(ids, titles, strict=True):
        if item and title:
            num_other += first.setdefault(item, title) != title
    notes = [f"{num_other:,} rows give an item another title than its first row"]
    return Catalogue(tuple(first), {TITLE: tuple(first.values())}), notes if num_other else []


def _user_fields(
    table: Table, columns: ColumnsConfig, max_bad_rows: float
) -> tuple[dict[str, dict[str, str]], list[str]]:
    ids = table.column(columns.user, "data.columns.user")
    bad = [*table.bad, *_without_value(table, ids, "empty user id")]
    _check_share(table, bad, max_bad_rows)
    fields = {
        name: dict(zip(ids, values, strict=True))
        for name, values in table.columns.items()
        if name != columns.user
    }
    return fields, _table_notes(table, bad, num_repeated=0)


def _parse(
    table: Table,
    column: str | None,
    role: str,
    no_column: str,
    parse: Callable[[str], Number | None],
) -> list[Number | None] | None:
    """The numbers of a column, None for a text that is no number; None without a column."""
    if column is None:
        return None
    texts = table.column(column, f"data.columns.{role}", f"or to null when {no_column}")
    return [parse(text) for text in texts]


def _first_faults(*found: BadRow) -> list[BadRow]:
    """The first fault of each row, by position."""
    first: dict[int, BadRow] = {}
    for fault in found:
        first.setdefault(fault.position, fault)
    return sorted(first.values())


def _without_value(
    table: Table, values: Sequence[object] | None, reason: str, column: str | None = None
) -> list[BadRow]:
    """The rows whose value is None or empty, with their text in ``column`` as the detail."""
    texts = None if column is None else table.columns[column]
    return [
        BadRow(table.positions[index], reason, "" if texts is None else repr(texts[index]))
        for index, value in enumerate(values or ())
        if value is None or value == ""
    ]


def _check_share(table: Table, bad: list[BadRow], max_bad_rows: float) -> None:
    num_bad = len({fault.position for fault in bad})
    if num_bad <= max_bad_rows * table.num_rows:
        return
    lines = [
        f"{table.name}: {num_bad:,} of {table.num_rows:,} rows cannot be used, more than "
        f"data.max_bad_rows: {max_bad_rows:g} allows; correct them or raise it",
        *(f"{count:,} rows: {reason}" for reason, count in _count(bad).items()),
        *_examples(table, bad),
    ]
    raise DataError("\n  ".join(lines))


def _count(bad: list[BadRow]) -> dict[str, int]:
    return dict(Counter(fault.reason for fault in bad).most_common())


def _examples(table: Table, bad: list[BadRow]) -> tuple[str, ...]:
    return tuple(
        f"{table.name} {table.unit} {fault.position}: {fault.reason}"
        + (f": {fault.detail}" if fault.detail else "")
        for fault in sorted(bad)[:_MAX_EXAMPLES]
    )


def _table_notes(table: Table, bad: list[BadRow], num_repeated: int) -> list[str]:
    notes = []
    if bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in _count(bad).items())
        notes.append(f"{table.name}: bad rows left out: {reasons}; {_examples(table, bad)[0]}")
    if num_repeated:
        notes.append(f"{table.name}: {num_repeated:,} rows repeat an id; the first row counts")
    return notes


def _one_line(texts: list[str]) -> list[str]:
    """Prompts hold one item a line: line breaks and runs of blanks become one blank.

    Scraped titles hold HTML entities, such as ``&amp;``, which become the characters.
    """
    characters = (_ENTITY.sub(lambda entity: html.unescape(entity[0]), text) for text in texts)
    return [" ".join(text.split()) for text in characters]


def _select(values: list[Number | None] | None, kept: list[int]) -> np.ndarray | None:
    """The kept numbers; int64 when all are whole, so that no digit is lost, else float64."""
    if values is None:
        return None
    chosen = [values[index] for index in kept]
    whole = all(isinstance(value, int) for value in chosen)
    return np.array(chosen, dtype=np.int64 if whole else np.float64)


def _time(text: str) -> Number | None:
    """A number, or the Unix time of an ISO 8601 date (without a zone: UTC)."""
    number = _number(text)
    if number is not None:
        return number
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(text: str) -> Number | None:
    try:
        number: Number = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return None
        if not math.isfinite(number):
            return None
        if number.is_integer():
            number = int(number)
    return number if abs(number) < _MAX_INTEGER else None
