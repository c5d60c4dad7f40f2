"""MIND, the news data set: what users read, from their histories and the clicks of impressions.

A user's history is a list without times. Its events get the second before the user's first
impression, so that they are one tie whose order is that of the list. Then each click of an
impression is an event at the time of the impression. What was shown and not clicked is left out.
"""

from collections.abc import Sequence
from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.formats.delimited import Layout, read_delimited
from pfm_llm.data.formats.format import Format
from pfm_llm.data.tables import BadRow, SourceTables, Table
from pfm_llm.data.times import Number, parse_times

COLUMNS = ColumnsConfig()
_BEHAVIORS, _NEWS = "behaviors.tsv", "news.tsv"
_BEHAVIOR_FIELDS = ("impression_id", "user_id", "time", "history", "impressions")
_NEWS_FIELDS = (
    *("item_id", "category", "subcategory", "title", "abstract", "url"),
    *("title_entities", "abstract_entities"),
)
_TEXTS = ("item_id", "title", "category", "subcategory", "abstract")
_CLICKED = "-1"


def mind_files(path: Path) -> tuple[Path, ...]:
    """The two files of a folder of MIND; empty if ``path`` is something else.

    Raises:
        DataError: ``news.tsv`` is missing.
    """
    if not (path / _BEHAVIORS).is_file():
        return ()
    if not (path / _NEWS).is_file():
        raise DataError(f"{path} holds {_BEHAVIORS} but not {_NEWS}; unpack all of MIND there")
    return path / _BEHAVIORS, path / _NEWS


def read_mind(path: Path) -> SourceTables:
    """Read a folder of MIND; the module describes the events.

    Returns:
        Tables with the columns of `COLUMNS`; items also have ``category``, ``subcategory`` and
        ``abstract``. Times are in seconds.

    Raises:
        DataError: A file cannot be read.
    """
    news = read_delimited(path / _NEWS, Layout("\t", _NEWS_FIELDS))
    items = Table(
        news.name,
        _TEXTS,
        {name: news.columns[name] for name in _TEXTS},
        news.positions,
        bad=news.bad,
        inferred=news.inferred,
    )
    behaviors = read_delimited(path / _BEHAVIORS, Layout("\t", _BEHAVIOR_FIELDS))
    return SourceTables(
        _events(behaviors), items, notes=("MIND: histories have no times and precede all clicks",)
    )


def _events(behaviors: Table) -> Table:
    columns = behaviors.columns
    times = parse_times(columns["time"], day_first=False).values
    impressions = [
        (user, time, history, shown)
        for user, time, history, shown in zip(
            columns["user_id"], times, columns["history"], columns["impressions"], strict=True
        )
        if time is not None
    ]
    first: dict[str, Number] = {}
    for user, time, _, _ in impressions:
        first[user] = min(time, first.get(user, time))
    events: list[tuple[str, str, str]] = []
    told: set[str] = set()
    for user, time, history, shown in impressions:
        if user not in told:  # every impression of a user shows the same history
            told.add(user)
            events += [(user, item, str(first[user] - 1)) for item in history.split()]
        clicked = (item for item in shown.split() if item.endswith(_CLICKED))
        events += [(user, item.removesuffix(_CLICKED), str(time)) for item in clicked]
    names = ("user_id", "item_id", "timestamp")
    return Table(
        name=behaviors.name,
        header=names,
        columns={name: [event[at] for event in events] for at, name in enumerate(names)},
        positions=range(1, len(events) + 1),
        unit="event",
        bad=(*behaviors.bad, *_undated(behaviors, times)),
        inferred=behaviors.inferred,
    )


def _undated(behaviors: Table, times: Sequence[Number | None]) -> tuple[BadRow, ...]:
    """A bad row for each impression without a date; below 0, where no event has its position."""
    return tuple(
        BadRow(-line, "impression without a date", f"line {line}")
        for line, time in zip(behaviors.positions, times, strict=True)
        if time is None
    )


FORMAT = Format("MIND", mind_files, read_mind, COLUMNS)
