"""The usable rows of tables of text. A bad row is counted and shown with its position."""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.columns import Roles, resolve, resolve_items
from pfm_llm.data.interactions import TITLE, Catalogue, RawInteractions
from pfm_llm.data.tables import BadRow, SourceTables, Table
from pfm_llm.data.times import Number, Times, parse_numbers, parse_times

_MAX_EXAMPLES = 5
MOST_CHARACTERS = 4096
"""Of a text of an item. A prompt shows much less of it."""

NO_TEXT = "item without text"
NOT_A_TIME = "timestamp is neither a number nor a date that can be read, such as 2020-01-31"
OTHER_UNIT = "timestamp in another unit than most; write all of them in one unit"
NOT_A_RATING = "rating is not a number"

_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")


def validate(
    tables: SourceTables,
    columns: ColumnsConfig,
    max_bad_rows: float,
    day_first: bool | None = None,
) -> RawInteractions:
    """Keep the usable rows, and count the others.

    Args:
        tables: The tables of the source.
        columns: The column of each role; see `columns.resolve`.
        max_bad_rows: Highest share of bad rows, of each table.
        day_first: Whether 01/02/2020 is the first of February; None: the column tells.

    Raises:
        DataError: A column is missing, nothing tells days from months, or a table has more bad rows
            than allowed; the message names file, line and reason of the first ones.
    """
    roles = resolve(tables, columns)
    rows = tables.interactions
    if tables.items is not None:
        catalogue, notes = _catalogue(tables.items, roles, columns.text, max_bad_rows)
    else:
        catalogue, notes = _catalogue_of_rows(rows, roles, columns.text)
    user_fields, user_notes = _user_fields(tables.users, roles, max_bad_rows)
    users, items = rows.columns[roles.user], rows.columns[roles.item]
    code_of = {item: code for code, item in enumerate(catalogue.item_ids)}
    codes = [code_of.get(item) for item in items]
    times = _times(rows, roles, day_first)
    ratings, rating_notes = _ratings(rows, roles)
    bad = _first_faults(
        *rows.bad,
        *_without_value(rows, users, "empty user id"),
        *_without_value(rows, items, "empty item id"),
        *_times_faults(rows, roles, times),
        *_without_value(rows, ratings, NOT_A_RATING, roles.rating),
        *_without_value(rows, codes, NO_TEXT, roles.item),
    )
    _check_share(rows, bad, max_bad_rows)
    faulty = {fault.position for fault in bad}
    kept = [index for index, at in enumerate(rows.positions) if at not in faulty]
    return RawInteractions(
        catalogue=catalogue,
        users=[users[index] for index in kept],
        items=np.array([codes[index] for index in kept], dtype=np.int64),
        timestamps=_select(None if times is None else times.values, kept),
        ratings=_select(ratings, kept),
        user_fields=user_fields,
        num_bad=_count(bad),
        examples=_examples(rows, bad),
        notes=(*tables.notes, *rows.notes, *notes, *user_notes, *rating_notes),
    )


def read_catalogue(
    table: Table, columns: ColumnsConfig, max_bad_rows: float
) -> tuple[Catalogue, list[str]]:
    """The items of a table, the first of equal ids, and notes on the rows left out.

    Raises:
        DataError: A column is missing, or more rows than allowed have no id or no text.
    """
    return _catalogue(table, resolve_items(table, columns), columns.text, max_bad_rows)


def text_columns(tables: SourceTables, roles: Roles) -> list[str]:
    """The columns that may describe an item beside its title."""
    table = tables.items or tables.interactions
    reserved = {roles.items_item, roles.title, TITLE}
    if tables.items is None:
        reserved |= {roles.user, roles.timestamp or "", roles.rating or ""}
    return [name for name in table.columns if name not in reserved]


def _texts(tables: SourceTables, roles: Roles, asked: Sequence[str] | None) -> dict[str, list[str]]:
    """Field to text of each row, the title first; the others as the config asks for them.

    Raises:
        DataError: The config asks for columns that are not there or have another role.
    """
    table, there = tables.items or tables.interactions, text_columns(tables, roles)
    if asked is None:
        asked = there if tables.items else ()
    names = [name for name in dict.fromkeys(asked) if name not in (roles.title, TITLE)]
    # Bytes are no text by themselves; a name asks for them.
    hidden = {*table.passed_over}
    if unknown := [name for name in names if name not in there and name not in hidden]:
        raise DataError(
            f"data.columns.text: {table.name} has no text column {', '.join(map(repr, unknown))}; "
            f"beside the title there are: {', '.join(there) or 'none'}"
        )
    columns = {TITLE: roles.title} | {name: name for name in names}
    return {name: _one_line(table.columns[column]) for name, column in columns.items()}


def _catalogue(
    table: Table, roles: Roles, asked: Sequence[str] | None, max_bad_rows: float
) -> tuple[Catalogue, list[str]]:
    ids = table.columns[roles.items_item]
    texts = _texts(SourceTables(table, table), roles, asked)
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
    notes = [*table.notes, *_table_notes(table, bad, len(good) - len(kept)), *_cut_texts(texts)]
    if others := [n for n in table.passed_over if n not in (roles.items_item, *texts)]:
        notes.append(f"{table.name}: columns that are no text: {', '.join(others)}")
    return Catalogue(tuple(first), fields), notes


def _catalogue_of_rows(
    table: Table, roles: Roles, asked: Sequence[str] | None
) -> tuple[Catalogue, list[str]]:
    """The first title that the rows give each item, and the first of each other text."""
    ids, texts = table.columns[roles.item], _texts(SourceTables(table), roles, asked)
    first: dict[str, str] = {}
    num_other = 0
    for item, title in zip(ids, texts[TITLE], strict=True):
        if item and title:
            num_other += first.setdefault(item, title) != title
    fields = {TITLE: tuple(first.values())}
    for name in list(texts)[1:]:
        told: dict[str, str] = {}
        for item, text in zip(ids, texts[name], strict=True):
            if text:
                told.setdefault(item, text)
        fields[name] = tuple(told.get(item, "") for item in first)
    notes = [f"{num_other:,} rows give an item another title than its first row"]
    return Catalogue(tuple(first), fields), notes if num_other else []


def _user_fields(
    table: Table | None, roles: Roles, max_bad_rows: float
) -> tuple[dict[str, dict[str, str]], list[str]]:
    if table is None:
        return {}, []
    ids = table.column(roles.user)
    bad = [*table.bad, *_without_value(table, ids, "empty user id")]
    _check_share(table, bad, max_bad_rows)
    fields = {
        name: dict(zip(ids, table.columns[name], strict=True))
        for name in table.columns
        if name != roles.user
    }
    return fields, [*table.notes, *_table_notes(table, bad, num_repeated=0)]


def _ratings(table: Table, roles: Roles) -> tuple[list[Number | None] | None, list[str]]:
    """The ratings, None for a text that is no number; None without a column, and notes.

    A column that the config does not name, and that has other texts than numbers, holds no ratings.
    """
    if roles.rating is None:
        return None, []
    ratings = parse_numbers(table.columns[roles.rating])
    if roles.is_rating_named or None not in ratings:
        return ratings, []
    place = table.place(table.positions[ratings.index(None)])
    return None, [
        f"{place}: no number, so that column {roles.rating!r} is not read as ratings; "
        f"data.columns.rating: {roles.rating} counts such rows as bad"
    ]


def _times(table: Table, roles: Roles, day_first: bool | None) -> Times | None:
    if roles.timestamp is None:
        return None
    texts = table.columns[roles.timestamp]
    times = parse_times(texts, day_first)
    if not times.unclear:
        return times
    told = [f"{table.place(table.positions[row])}: {texts[row]!r}" for row in times.unclear]
    what = f"{told[0]} may begin with the day or with the month, and the others"
    if len(told) > 1:
        what = f"{told[0]} begins with the day, {told[1]} with the month, and the others"
    raise DataError(
        f"{what} in column {roles.timestamp!r} do not tell; set data.day_first: true if the day is "
        "first, and data.day_first: false if the month is"
    )


def _times_faults(table: Table, roles: Roles, times: Times | None) -> list[BadRow]:
    if times is None or roles.timestamp is None:
        return []
    texts = table.columns[roles.timestamp]
    return [
        *_without_value(table, times.values, NOT_A_TIME, roles.timestamp),
        *(
            BadRow(table.positions[row], OTHER_UNIT, f"{texts[row]!r} among {times.unit}")
            for row in times.odd
        ),
    ]


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
        f"{table.place(fault.position)}: {fault.reason}"
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

    Scraped titles hold HTML entities, such as ``&amp;``, which become the characters. What a text
    has beyond `MOST_CHARACTERS` is cut off.
    """
    begun = (text[: 4 * MOST_CHARACTERS] for text in texts)
    characters = (_ENTITY.sub(lambda entity: html.unescape(entity[0]), text) for text in begun)
    return [" ".join(text.split())[:MOST_CHARACTERS] for text in characters]


def _cut_texts(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """A note on the texts that were cut off."""
    number = sum(len(text) == MOST_CHARACTERS for values in texts.values() for text in values)
    if not number:
        return []
    return [f"{number:,} texts of items are cut after {MOST_CHARACTERS:,} characters"]


def _select(values: list[Number | None] | None, kept: list[int]) -> np.ndarray | None:
    """The kept numbers; int64 when all are whole, so that no digit is lost, else float64."""
    if values is None:
        return None
    chosen = [values[index] for index in kept]
    whole = all(isinstance(value, int) for value in chosen)
    return np.array(chosen, dtype=np.int64 if whole else np.float64)
