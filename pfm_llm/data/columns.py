"""The column of each role: as the config names it, or recognised by a usual name."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pfm_llm.base.errors import DataError
from pfm_llm.base.terminal import harmless
from pfm_llm.config.data import RECOGNISED, ColumnsConfig
from pfm_llm.data.tables import SourceTables, Table
from pfm_llm.data.times import parse_times

_ITEM_NAMES = (
    *("item_id", "item", "iid", "movie_id", "film_id", "parent_asin", "asin", "product_id"),
    *("sku", "book_id", "isbn", "isbn13", "track_id", "song_id", "artist_id", "album_id"),
    *("news_id", "article_id", "game_id", "app_id", "business_id", "recipe_id", "anime_id"),
    *("show_id", "video_id", "poi_id", "venue_id", "location_id", "course_id", "job_id"),
    *("product", "item_code", "item_no", "stock_code"),
)
USUAL = {
    "user": (
        *("user_id", "user", "uid", "reviewer_id", "customer_id", "customer", "client_id"),
        *("member_id", "account_id", "visitor_id", "household_id", "reader_id", "person_id"),
        *("session_id", "profile_id", "user_name", "user_no"),
    ),
    "item": _ITEM_NAMES,
    "timestamp": (
        *("timestamp", "time", "ts", "unix_review_time", "unix_time", "unix_timestamp", "epoch"),
        *("datetime", "date_time", "event_time", "created_at", "created", "time_created"),
        *("date", "rated_at", "review_date", "event_date", "event_timestamp", "interaction_time"),
        *("purchase_date", "order_date", "date_added", "date_updated", "review_time"),
    ),
    "rating": ("rating", "overall", "stars", "score", "star_rating", "user_rating", "book_rating"),
    "title": (
        *("title", "name", "movie_title", "item_title", "product_title", "book_title", "item_name"),
        *("product_name", "movie_name", "news_title", "film_title", "track_name", "song_title"),
        *("headline", "original_title", "game_title", "app_name", "game_name", "artist_name"),
        *("venue_name", "business_name", "recipe_name", "show_name", "video_title"),
        *("course_title", "course_name", "job_title", "article_title", "album_name", "song_name"),
    ),
    "items_item": (*_ITEM_NAMES, "id"),
}
"""Role to the names by which its column is recognised, the first of them that is there."""

_TYPED = re.compile(r"(.+):(?:token|token_seq|float|float_seq)")
_NEAR = 0.6
_SAMPLE = 50  # rows
_OPTIONAL = ("timestamp", "rating")
_HINTS = {
    "timestamp": "; set it to null if the rows are in order",
    "title": "; or name a file of item texts in data.items",
}


def fold(name: str) -> str:
    """A name without case and punctuation: ``userId``, ``user_id`` and ``User ID`` agree."""
    return re.sub(r"[\W_]+", "", name.casefold())


_FOLDED = {role: [fold(name) for name in names] for role, names in USUAL.items()}
_ALL_FOLDED = {name for names in _FOLDED.values() for name in names}


def untyped(name: str) -> str:
    """A name without its type in the files of RecBole: ``user_id`` for ``user_id:token``."""
    typed = _TYPED.fullmatch(name)
    return typed[1] if typed else name


def is_usual(name: str) -> bool:
    """Whether a column of this name has a role by its name."""
    return fold(name) in _ALL_FOLDED


@dataclass(frozen=True)
class Roles:
    """The column of each role, all of them in the tables.

    Attributes:
        user: Of the interactions.
        item: Of the interactions.
        timestamp: Of the interactions; None: the rows are in order.
        rating: Of the interactions; None: there are no ratings.
        title: Of the items, or of the interactions if there is no table of items.
        items_item: The id in the table of items, or `item` if there is none.
        is_rating_named: Whether the config names the rating; else it was recognised.
    """

    user: str
    item: str
    timestamp: str | None
    rating: str | None
    title: str
    items_item: str
    is_rating_named: bool = False

    def as_config(self) -> ColumnsConfig:
        """The section ``data.columns`` that names these columns."""
        apart = None if self.items_item == self.item else self.items_item
        return ColumnsConfig(
            user=self.user,
            item=self.item,
            timestamp=self.timestamp,
            rating=self.rating,
            title=self.title,
            items_item=apart,
        )


def resolve(tables: SourceTables, asked: ColumnsConfig) -> Roles:
    """Find the column of each role.

    A name that the config gives is taken. A role that the config leaves at its default takes the
    first of the `USUAL` names that is there and has no other role.

    Raises:
        DataError: The columns of some roles are not there. The message names all of them, and ends
            with a block for the config.
    """
    found: dict[str, str | None] = {}
    # What the config names is not recognised as anything else.
    for role in sorted(USUAL, key=lambda role: not _is_named(role, asked)):
        found[role] = _find(role, tables, asked, found)
    required = [role for role in USUAL if found[role] is None and not _may_lack(role, asked)]
    if tables.items is None and "items_item" in required:
        required.remove("items_item")
    if required:
        raise DataError(_refusal(required, found, tables, asked))
    is_named = asked.rating not in (None, RECOGNISED)
    settings: dict[str, Any] = {**found, "is_rating_named": is_named}
    return Roles(**settings)


def resolve_items(items: Table, asked: ColumnsConfig) -> Roles:
    """The columns of a table of items alone; its other roles are those of the config.

    Raises:
        DataError: A column is missing; see `resolve`.
    """
    header = (asked.user, asked.item, *filter(None, (asked.timestamp,)))
    rows = Table("", header, {}, ())
    return resolve(SourceTables(rows, items), asked.model_copy(update={"rating": None}))


def names_in(asked: ColumnsConfig) -> set[str]:
    """All column names of a section ``data.columns``, the defaults included."""
    return {name for name in map(asked.__getattribute__, USUAL) if name not in (None, RECOGNISED)}


def user_column(rows: Table, asked: ColumnsConfig) -> str | None:
    """The column of users in the interactions; None if there is none."""
    return _find("user", SourceTables(rows), asked, {})


def _is_named(role: str, asked: ColumnsConfig) -> bool:
    return getattr(asked, role) != ColumnsConfig.model_fields[role].default


def _may_lack(role: str, asked: ColumnsConfig) -> bool:
    return role in _OPTIONAL and getattr(asked, role) in (None, RECOGNISED)


def _table(role: str, tables: SourceTables) -> Table:
    of_items = role in ("title", "items_item") and tables.items is not None
    return tables.items if of_items and tables.items else tables.interactions


def _find(
    role: str, tables: SourceTables, asked: ColumnsConfig, found: Mapping[str, str | None]
) -> str | None:
    table = _table(role, tables)
    header, texts = table.header, set(table.columns)
    name: str | None = getattr(asked, role)
    if role in _OPTIONAL and name is None:
        return None
    if role == "items_item" and tables.items is None:
        return found["item"]
    if name is not None and (name in texts or _is_named(role, asked)):
        return next((text for text in (name, untyped(name)) if text in header), None)
    same = found.get("item") if role == "items_item" else None
    if same is not None and (same in header or asked.item in header):
        return same if same in header else asked.item
    taken = _taken(role, tables, found)
    # A column that is no text is taken if it must be: bytes may be ids.
    others = () if role == "rating" else header
    return (
        _recognised(role, [column for column in header if column in texts], taken)
        or (name if name in others else None)
        or _recognised(role, others, taken)
    )


def _taken(role: str, tables: SourceTables, found: Mapping[str, str | None]) -> set[str]:
    """The columns of the role's table that another role has."""
    table = _table(role, tables)
    return {
        name
        for other, name in found.items()
        if name is not None and other != role and _table(other, tables) is table
    }


def _recognised(role: str, header: Sequence[str], taken: Collection[str]) -> str | None:
    free = {fold(name): name for name in reversed(header) if name not in taken}
    return next((free[name] for name in _FOLDED[role] if name in free), None)


def _refusal(
    required: Sequence[str],
    found: Mapping[str, str | None],
    tables: SourceTables,
    asked: ColumnsConfig,
) -> str:
    """All that is missing, what there is, and a block for the config."""
    proposed = _proposed(required, found, tables, asked)
    lines = ["some columns are missing:"]
    for role in required:
        table = _table(role, tables)
        name = getattr(asked, role) or asked.item
        free = [c for c in table.header if c not in _taken(role, tables, proposed)]
        if proposed.get(role) is not None:
            remedy = f"set it to {proposed[role]}, if that is it"
        else:
            remedy = f"set it to one of: {', '.join(free)}" if free else "no column is left for it"
        hint = "" if role == "title" and tables.items is not None else _HINTS.get(role, "")
        lines.append(f"{table.name} has no column {name!r} (data.columns.{role}): {remedy}{hint}")
    lines += [
        f"the columns of {table.name}: {', '.join(table.header)}"
        for table in (tables.interactions, tables.items)
        if table is not None and table.name
    ]
    lines += [
        f"{table.name} was read as one column; if its fields are separated, say by what in "
        "data.reading.separator"
        for table in (tables.interactions, tables.items)
        if table is not None and len(table.header) == 1 and "separator" in table.layout
    ]
    if not any(is_usual(name) for name in tables.interactions.header):
        lines.append("if the first line of the file is no header, add one that names the columns")
    block = as_block({"data": {"columns": proposed}})
    told = "\n  ".join(map(harmless, lines))
    return f"{told}\nA block for the config; check it before use:\n{block}"


def _proposed(
    required: Sequence[str],
    found: Mapping[str, str | None],
    tables: SourceTables,
    asked: ColumnsConfig,
) -> dict[str, str | None]:
    """The columns that were found, and for each other role one that has no role, if one suits.

    A like name counts first, then the content, then the order of columns.
    """
    roles = dict(found)

    def free(role: str) -> list[str]:
        return [c for c in _table(role, tables).header if c not in _taken(role, tables, roles)]

    for role in required:
        name = getattr(asked, role) or asked.item
        roles[role] = _recognised(role, free(role), ()) or _nearest(name, free(role))
    for role, suits in (
        ("timestamp", _holds_dates), ("user", _any), ("item", _any), ("items_item", _any),
        ("timestamp", _holds_times), ("title", _holds_texts),
    ):  # fmt: skip
        if role in required and roles[role] is None and (role != "title" or tables.items):
            values = _table(role, tables).columns
            roles[role] = next((c for c in free(role) if suits(values[c][:_SAMPLE])), None)
    if tables.items is None or roles["items_item"] == roles["item"]:
        roles.pop("items_item", None)
    rows_are_in_order = roles["timestamp"] is None and not free("timestamp")
    return {
        role: name
        for role, name in roles.items()
        if name is not None or (role == "timestamp" and rows_are_in_order)
    }


def _any(_: Sequence[str]) -> bool:
    return True


def _holds_times(values: Sequence[str]) -> bool:
    return None not in parse_times(values).values


def _holds_dates(values: Sequence[str]) -> bool:
    times = parse_times(values)
    return None not in times.values and times.per_second is not None


def _holds_texts(values: Sequence[str]) -> bool:
    return not any(value is not None for value in parse_times(values).values)


def as_block(tree: Mapping[str, object]) -> str:
    """A part of a config as YAML, in short lines."""
    # A wide line, so that the names of columns stay on one.
    text: str = yaml.safe_dump(
        tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000
    )
    return text.rstrip()


def _nearest(name: str, header: Sequence[str]) -> str | None:
    folded = {fold(column): column for column in header}
    matches = difflib.get_close_matches(fold(name), folded, 1, cutoff=_NEAR)
    return folded[matches[0]] if matches else None
