"""Users' histories over a catalogue of items with text.

Users and items have internal ids, 0 to n - 1: the positions of their external ids in
`Interactions.user_ids` and `Catalogue.item_ids`.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pfm_llm.base.errors import DataError
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.choices import Repeats
from pfm_llm.config.data import DataConfig
from pfm_llm.data.history import History
from pfm_llm.data.report import LoadReport

TITLE = "title"
"""The one text field that every catalogue has."""

_MIN_ITEMS = 2
REPEAT = "repeat of an item that the user has already (data.repeats: first_only)"
TOO_FEW = "user with fewer than data.min_interactions"
NOT_SAMPLED = "user not in the sample (data.max_users)"


@dataclass(frozen=True)
class Catalogue:
    """All items that can be recommended, with or without interactions.

    Attributes:
        item_ids: External ids, distinct; the position is the internal id.
        fields: Text fields, each one string per item, ``""`` where unknown. At least ``title``.

    Raises:
        DataError: An id comes twice, there is no title, or a field has another length.
    """

    item_ids: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if TITLE not in self.fields:
            there = ", ".join(self.fields) or "none"
            raise DataError(f"the catalogue has no text field {TITLE!r}; its fields: {there}")
        _check_ids("catalogue", self.item_ids, self.fields)

    def __len__(self) -> int:
        return len(self.item_ids)

    def take(self, items: Sequence[int] | np.ndarray) -> "Catalogue":
        """Some items by their internal ids, distinct, in that order."""
        fields = {name: tuple(texts[i] for i in items) for name, texts in self.fields.items()}
        return Catalogue(tuple(self.item_ids[i] for i in items), fields)

    def content_hash(self) -> str:
        """SHA-256, in hex, over ids and fields; the order of the fields does not matter."""
        return _text_hash("catalogue", self.item_ids, self.fields).hexdigest()


@dataclass(frozen=True, eq=False)
class Interactions:
    """Every user's history, one after another, oldest item first.

    Ties in time keep the order of the source file, so that nothing depends on item ids. The
    arrays are read-only: ``torch.tensor(...)`` copies them.

    Attributes:
        catalogue: The items.
        user_ids: External ids, distinct; the position is the internal id.
        offsets: int64 [num_users + 1]: user ``u`` owns positions ``offsets[u]:offsets[u + 1]``.
        items: int32 [num_interactions], internal item ids.
        timestamps: int64 [num_interactions], or float64 if some are no whole numbers; seconds or
            any other order, not descending within a user; None where only the order is known.
        ratings: float32 [num_interactions]; None where there are none.
        user_fields: Fields such as age, each one string per user, ``""`` where unknown.

    Raises:
        DataError: The parts do not fit together.
    """

    catalogue: Catalogue
    user_ids: tuple[str, ...]
    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None = None
    ratings: np.ndarray | None = None
    user_fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _freeze(self, "offsets", np.int64)
        _freeze(self, "items", np.int32)
        _freeze(self, "timestamps", _time_type(self.timestamps))
        _freeze(self, "ratings", np.float32)
        _check_ids("interactions", self.user_ids, self.user_fields)
        _check_arrays(self)

    @classmethod
    def of_user(cls, catalogue: Catalogue, user_id: str, history: History) -> "Interactions":
        """The history of a single user, as a data set."""
        offsets = np.array([0, len(history)])
        return cls(catalogue, (user_id,), offsets, history.items, ratings=history.ratings)

    @property
    def num_users(self) -> int:
        """Users, those with an empty history included."""
        return len(self.user_ids)

    @property
    def num_interactions(self) -> int:
        """Interactions of all users."""
        return len(self.items)

    def user(self, user_id: str | int) -> int:
        """The internal id of a user; a number is the same as its digits.

        Raises:
            DataError: There is no such user; the message names some.
        """
        if str(user_id) not in self.user_ids:
            first = ", ".join(self.user_ids[:3])
            raise DataError(f"no user {user_id!r} in the data; users are {first}, …")
        return self.user_ids.index(str(user_id))

    def history(self, user: int) -> np.ndarray:
        """The items of internal user ``user``, oldest first: a view, int32 [length]."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def history_of(self, user: int) -> History:
        """The items and ratings of internal user ``user``: views, int32 and float32 [length]."""
        own = slice(self.offsets[user], self.offsets[user + 1])
        return History(self.items[own], None if self.ratings is None else self.ratings[own])

    def content_hash(self) -> str:
        """SHA-256, in hex, over the interactions, the users and the catalogue."""
        return self._hash(self.catalogue.content_hash())

    def events_hash(self) -> str:
        """SHA-256, in hex, over the interactions and the users, without the items' texts."""
        return self._hash("")

    def with_item_order(self, order: Sequence[int]) -> "Interactions":
        """The same interactions over a catalogue in another order.

        Args:
            order: Internal ids of all items, in their new order.
        """
        return dataclasses.replace(
            self,
            catalogue=self.catalogue.take(order),
            items=np.argsort(order).astype(np.int32)[self.items],
        )

    def _hash(self, catalogue_hash: str) -> str:
        digest = _text_hash("interactions", self.user_ids, self.user_fields)
        digest.update(catalogue_hash.encode())
        for name in ("offsets", "items", "timestamps", "ratings"):
            array: np.ndarray | None = getattr(self, name)
            digest.update(f"{name}:{'none' if array is None else array.shape}".encode())
            if array is not None:
                little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
                digest.update(np.ascontiguousarray(little_endian).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class RawInteractions:
    """The usable rows of a source in their order, and an account of its other rows.

    Attributes:
        catalogue: The items.
        users: External user id of each row, not empty.
        items: Internal item id of each row, int [rows].
        timestamps: int64 or float64 [rows], finite; None: the rows are in order.
        ratings: float [rows]; None: no ratings.
        user_fields: Field name to a mapping from external user id to text.
        num_bad: Reason to number of rows that cannot be used.
        examples: The first rows that cannot be used: file, line and reason.
        notes: For the report.
    """

    catalogue: Catalogue
    users: Sequence[str]
    items: np.ndarray
    timestamps: np.ndarray | None = None
    ratings: np.ndarray | None = None
    user_fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    num_bad: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def build_interactions(
    raw: RawInteractions, config: DataConfig, seed: int
) -> tuple[Interactions, LoadReport]:
    """Sort rows into histories and apply ``repeats``, ``min_interactions``, ``max_users``.

    Internal user ids follow the first appearance of each kept user in the file. The catalogue
    stays as it is, since an item without interactions can still be recommended, unless
    ``met_items_only`` leaves such items out.

    Args:
        raw: The usable rows.
        config: ``repeats``, ``min_interactions``, ``max_users`` and ``met_items_only`` are read.
        seed: The experiment's seed; matters only with ``max_users``.

    Returns:
        The interactions, and the report with the numbers of dropped rows.

    Raises:
        DataError: The catalogue has fewer than two items, or no interaction is left.
    """
    num_rows = len(raw.users) + sum(raw.num_bad.values())
    if not raw.users:
        raise DataError(_nothing_left(num_rows, raw.num_bad, raw.examples))
    if len(raw.catalogue) < _MIN_ITEMS:
        raise DataError(
            f"a catalogue of {len(raw.catalogue)} item: ranking needs at least {_MIN_ITEMS} "
            "items with text; check data.source, data.items and data.columns"
        )
    rows, dropped = _select(_sorted_rows(raw), config, seed)
    dropped = {**raw.num_bad, **dropped}
    if not len(rows):
        raise DataError(_nothing_left(num_rows, dropped, raw.examples))
    interactions = _gather(raw, rows)
    if config.met_items_only:
        interactions = _met_items_only(interactions)
    num_ties = int(rows.duplicated(["user", "time"]).sum()) if "time" in rows else 0
    report = LoadReport(
        num_rows=num_rows,
        num_interactions=len(rows),
        num_users=interactions.num_users,
        num_items=len(interactions.catalogue),
        dropped=dropped,
        examples=raw.examples,
        notes=(*raw.notes, *_notes(interactions, num_ties)),
    )
    return interactions, report


def _sorted_rows(raw: RawInteractions) -> Any:
    """A frame of the rows by user, within a user by time; ties keep the order of the file.

    Its column ``user`` numbers users by first appearance. It has no ``time`` or ``rating`` where
    the source has none.
    """
    columns = {"item": raw.items, "time": raw.timestamps, "rating": raw.ratings}
    rows = pd.DataFrame({name: values for name, values in columns.items() if values is not None})
    rows["user"] = pd.factorize(np.array(raw.users, dtype=object))[0]
    keys = ["user", "time"] if "time" in rows else ["user"]
    return rows.sort_values(keys, kind="stable")


def _select(rows: Any, config: DataConfig, seed: int) -> tuple[Any, dict[str, int]]:
    """Drop repeats, then short histories, then users beyond the sample; count the rows."""
    dropped: dict[str, int] = {}

    def keep(mask: Any, reason: str) -> Any:
        if not mask.all():
            dropped[reason] = int((~mask).sum())
        return rows[mask]

    if config.repeats is Repeats.FIRST_ONLY:
        rows = keep(~rows.duplicated(["user", "item"]), REPEAT)
    lengths = rows.groupby("user")["item"].transform("size")
    rows = keep(lengths >= config.min_interactions, TOO_FEW)
    users = np.unique(rows["user"])
    if config.max_users is not None and config.max_users < len(users):
        draw = numpy_generator(seed, "max_users")
        sample = draw.choice(users, size=config.max_users, replace=False)
        rows = keep(rows["user"].isin(sample), NOT_SAMPLED)
    return rows, dropped


def _gather(raw: RawInteractions, rows: Any) -> Interactions:
    """The interactions of sorted rows, whose index holds their positions in the file."""
    lengths = rows.groupby("user").size()
    user_ids = tuple(raw.users[row] for row in rows.index[~rows.duplicated("user")])
    return Interactions(
        catalogue=raw.catalogue,
        user_ids=user_ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=rows["item"].to_numpy(),
        timestamps=rows["time"].to_numpy() if "time" in rows else None,
        ratings=rows["rating"].to_numpy() if "rating" in rows else None,
        user_fields={
            name: tuple(values.get(user, "") for user in user_ids)
            for name, values in raw.user_fields.items()
        },
    )


def _met_items_only(interactions: Interactions) -> Interactions:
    met, items = np.unique(interactions.items, return_inverse=True)
    if len(met) < _MIN_ITEMS:
        raise DataError("data.met_items_only: true leaves fewer than 2 items; set it to false")
    return dataclasses.replace(
        interactions, catalogue=interactions.catalogue.take(met), items=items
    )


def _notes(interactions: Interactions, num_ties: int) -> list[str]:
    notes = []
    if interactions.timestamps is None:
        notes.append("no timestamps: file order is taken as order in time")
    if num_ties:
        notes.append(
            f"{num_ties:,} rows share their time with the same user's row before: file order; "
            "data.keep_ties: true never cuts a history between them"
        )
    if (note := _identical_text(interactions.catalogue)) is not None:
        notes.append(note)
    total = len(interactions.catalogue)
    if num_unseen := total - len(np.unique(interactions.items)):
        notes.append(
            f"{num_unseen:,} of {total:,} items of the catalogue have no interactions; "
            "data.met_items_only: true leaves them out"
        )
    return notes


def _identical_text(catalogue: Catalogue) -> str | None:
    groups: dict[tuple[str, ...], list[str]] = {}
    texts = zip(*catalogue.fields.values(), strict=True)
    for item_id, text in zip(catalogue.item_ids, texts, strict=True):
        groups.setdefault(text, []).append(item_id)
    twins = [ids for ids in groups.values() if len(ids) > 1]
    if not twins:
        return None
    titles = dict(zip(catalogue.item_ids, catalogue.fields[TITLE], strict=True))
    shown = "; ".join(
        f"{titles[ids[0]]!r} ({', '.join(ids[:4])}{', …' if len(ids) > 4 else ''})"
        for ids in twins[:3]
    )
    return (
        f"{sum(map(len, twins)) - len(twins):,} items have the same text as an earlier item, in "
        f"{len(twins):,} groups that the text cannot tell apart, e.g. {shown}"
    )


def _nothing_left(num_rows: int, dropped: Mapping[str, int], examples: tuple[str, ...]) -> str:
    lower = ", or lower data.min_interactions" if TOO_FEW in dropped else ""
    lines = [
        f"no interactions left of {num_rows:,} rows; check data.source and data.columns{lower}"
    ]
    lines += [f"  {count:,} dropped: {reason}" for reason, count in dropped.items()]
    return "\n".join([*lines, *(f"  {example}" for example in examples)])


def _check_ids(what: str, ids: tuple[str, ...], fields: Mapping[str, Sequence[str]]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise DataError(f"{what}: id {twice!r} comes twice")
    for name, values in fields.items():
        if len(values) != len(ids):
            raise DataError(f"{what}: field {name!r} has {len(values)} values for {len(ids)} ids")


def _check_arrays(interactions: Interactions) -> None:
    offsets, items = interactions.offsets, interactions.items
    expected = (interactions.num_users + 1,)
    if offsets.shape != expected or items.ndim != 1:
        raise DataError(f"interactions: offsets of shape {offsets.shape}, expected {expected}")
    if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise DataError(f"interactions: offsets must rise from 0 to {len(items)}")
    if len(items) and not 0 <= items.min() <= items.max() < len(interactions.catalogue):
        raise DataError(f"interactions: items must be in [0, {len(interactions.catalogue)})")
    for name in ("timestamps", "ratings"):
        array = getattr(interactions, name)
        if array is not None and array.shape != items.shape:
            raise DataError(f"interactions: {name} of shape {array.shape}, not {items.shape}")


def _time_type(times: np.ndarray | None) -> type:
    """int64 if no digit is lost by it, else float64."""
    is_whole = times is None or np.asarray(times).dtype.kind != "f" or not np.any(np.mod(times, 1))
    return np.int64 if is_whole else np.float64


def _freeze(interactions: Interactions, name: str, dtype: type) -> None:
    """Hold the array as a read-only view; the caller's own array stays writable."""
    array = getattr(interactions, name)
    if array is not None:
        view: np.ndarray = np.asarray(array, dtype=dtype).view()
        view.flags.writeable = False
        object.__setattr__(interactions, name, view)


def _text_hash(
    what: str, ids: tuple[str, ...], fields: Mapping[str, tuple[str, ...]]
) -> "hashlib._Hash":
    content = json.dumps([what, ids, sorted(fields.items())])  # JSON: no two texts collide
    return hashlib.sha256(content.encode())
