"""Tables of text that know the line of each row, whatever file they come from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


class LazyColumns(Mapping[str, list[str]]):
    """Columns of which each is read when it is first asked for.

    Args:
        names: The columns that an iteration goes through.
        load: Gives a column, also one that is not in ``names``; raises KeyError if there is none.
    """

    def __init__(self, names: Sequence[str], load: Callable[[str], list[str]]) -> None:
        self._names = tuple(names)
        self._load = load
        self._read: dict[str, list[str]] = {}

    def __getitem__(self, name: str) -> list[str]:
        """The values of a column, one for each row."""
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the source."""
        return iter(self._names)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._names)


@dataclass(frozen=True)
class Table:
    """Columns of stripped text.

    Attributes:
        name: The file or data set, for messages.
        header: All columns of the source, also those that are no text.
        columns: Column name to one string per row, ``""`` where there is none.
        positions: Line or row of each row in the source, from 1.
        unit: The unit of ``positions``: ``"line"`` or ``"row"``.
        bad: Rows that do not fit the header, such as those with too few fields.
        inferred: What the reader inferred, such as the separator, in words.
        layout: The same as settings of ``data.reading``; empty if the file says it itself.
        notes: For the report of a load.
        parts: The files of a table that has several, each with its first position less one.
    """

    name: str
    header: tuple[str, ...]
    columns: Mapping[str, list[str]]
    positions: Sequence[int]
    unit: str = "line"
    bad: tuple[BadRow, ...] = ()
    inferred: tuple[str, ...] = ()
    layout: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[tuple[int, str], ...] = ()

    def place(self, position: int) -> str:
        """The file and the line, or row, of a position."""
        starts = [part for part in self.parts if part[0] < position]
        start, name = starts[-1] if starts else (0, self.name)
        return f"{name} {self.unit} {position - start}"

    @property
    def passed_over(self) -> list[str]:
        """Columns of the header that an iteration leaves out, since they are no text."""
        return [name for name in self.header if name not in set(self.columns)]

    @property
    def num_rows(self) -> int:
        """All rows, good and bad."""
        return len(self.positions) + len(self.bad)

    def column(self, name: str) -> list[str]:
        """The column ``name``, which the format of the file prescribes.

        Raises:
            DataError: There is no such column; the message names it and all columns.
        """
        try:
            return self.columns[name]
        except KeyError:
            there = ", ".join(self.header)
            raise DataError(
                f"{self.name} has no column {name!r}; its columns: {there}; is the file whole?"
            ) from None


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


def check_header(name: str, header: Sequence[str]) -> None:
    """Refuse a table in which two columns have one name.

    Raises:
        DataError: The message names the column.
    """
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise DataError(f"{name}: column {min(twice)!r} comes twice; rename one of them")
