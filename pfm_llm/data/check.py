"""A check of a source before training: the rows that are read or dropped, and the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import yaml

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.schema import ColumnsConfig, DataConfig
from pfm_llm.data.interactions import (
    TITLE,
    Catalogue,
    Interactions,
    RawInteractions,
    build_interactions,
)
from pfm_llm.data.report import LoadReport
from pfm_llm.data.rows import SourceTables, validate
from pfm_llm.data.sources import read_source
from pfm_llm.data.splits import split_interactions

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Of the lengths of histories."""

_OPTIONAL = ("timestamp", "rating")
_UNIX_SECONDS = (100_000_000, 4_102_444_800)  # 1973 to 2100; smaller numbers are an order
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Ratings:
    """Statistics of the ratings.

    Attributes:
        low: The lowest.
        high: The highest.
        threshold: ``data.like_threshold``: a rating from here on is a like.
        share_liked: Share of the interactions that are likes, in [0, 1].
        num_users_with_both: Users who have likes and other ratings; no other has an AUC.
    """

    low: float
    high: float
    threshold: float
    share_liked: float
    num_users_with_both: int


@dataclass(frozen=True)
class DataCheck:
    """The result of a check of a source.

    Attributes:
        config: The section ``data`` of the check.
        columns: Role to its column; None if no column has the role.
        unused: Columns of the interactions that have no role.
        item_fields: The text fields of items.
        report: The rows that were read and dropped.
        times: The first and the last timestamp; None: rows are in order.
        lengths: Events of a user, at each of `QUANTILES`.
        num_same_titles: Number of items with the title of an earlier item.
        same_titles: Some of those titles.
        ratings: Statistics of the ratings; None without ratings.
        split: A description of the split; None if splitting fails.
        problems: The reasons for which training would fail; empty if it would not.
    """

    config: DataConfig
    columns: Mapping[str, str | None]
    unused: tuple[str, ...]
    item_fields: tuple[str, ...]
    report: LoadReport
    times: tuple[int, int] | None
    lengths: tuple[int, ...]
    num_same_titles: int
    same_titles: tuple[str, ...]
    ratings: Ratings | None
    split: str | None
    problems: tuple[str, ...]

    def describe(self) -> str:
        """All of it as lines of text; the last ones are a block for a config."""
        lines = [f"source: {self.config.source}"]
        if self.config.items is not None:
            lines.append(f"items: {self.config.items}")
        roles = (f"{role} = {name or 'none'}" for role, name in self.columns.items())
        lines.append(f"columns: {', '.join(roles)}")
        if self.unused:
            lines.append(f"columns that are not read: {', '.join(self.unused)}")
        lines += [
            f"texts of an item: {', '.join(self.item_fields)}",
            self.report.describe(),
            f"time: {_times_text(self.times)}",
            f"events of a user: {_lengths_text(self.lengths)}",
            f"titles: {_titles_text(self.num_same_titles, self.same_titles)}",
            f"ratings: {_ratings_text(self.ratings, self.report.num_users)}",
        ]
        if self.split is not None:
            lines.append("split: " + self.split.replace("\n", "\n  "))
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "", "The block for a config:", "", self.block()])

    def block(self) -> str:
        """The block ``data:`` of a config that reads this source, as YAML."""
        data: dict[str, object] = {"source": self.config.source}
        if self.config.items is not None:
            data["items"] = self.config.items
        asked = self.config.columns.model_dump()
        if self.columns == asked:  # other sources bring columns of their own
            data["columns"] = {
                role: name for role, name in asked.items() if name is not None or role != "rating"
            }
        text: str = yaml.safe_dump(
            {"data": data}, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000
        )
        return text.rstrip()


def data_config(source: str, items: str | None = None, columns: Sequence[str] = ()) -> DataConfig:
    """The section ``data`` of a config, from what a command line says.

    Args:
        source: As ``data.source``.
        items: As ``data.items``.
        columns: ``role=name`` for roles whose column is not named as by default;
            ``timestamp=null`` and ``rating=null`` say that there is none.

    Raises:
        ConfigError: An entry of ``columns`` has another form, or names no role.
    """
    named: dict[str, str | None] = {}
    for entry in columns:
        role, _, name = entry.partition("=")
        if not name or role not in ColumnsConfig.model_fields:
            raise ConfigError(
                f"column {entry!r}: write role=name, with one of the roles "
                f"{', '.join(ColumnsConfig.model_fields)}"
            )
        named[role] = None if name == "null" and role in _OPTIONAL else name
    return DataConfig(source=source, items=items, columns=ColumnsConfig.model_validate(named))


def check_data(config: DataConfig) -> DataCheck:
    """Read a source like training does, but without a cache, and describe the result.

    Args:
        config: The section ``data``.

    Returns:
        The result; ``problems`` has the reasons for which training would refuse the data.

    Raises:
        DataError: The source or a column is missing, or no row can be used.
        AssetError: The embedded data set cannot be had.
    """
    tables, columns = read_source(config)
    problems: list[str] = []
    raw = _usable_rows(tables, columns, config, problems)
    interactions, report = build_interactions(raw, config, seed=0)
    split = None
    try:
        split = split_interactions(interactions, config).describe()
    except DataError as error:
        problems.append(str(error))
    times = interactions.timestamps
    lengths = np.quantile(np.diff(interactions.offsets), QUANTILES, method="nearest")
    same = _same_titles(interactions.catalogue)
    roles: dict[str, str | None] = columns.model_dump()
    return DataCheck(
        config=config,
        columns=roles,
        unused=tuple(c for c in tables.interactions.header if c not in roles.values()),
        item_fields=tuple(interactions.catalogue.fields),
        report=report,
        times=None if times is None else (int(times.min()), int(times.max())),
        lengths=tuple(int(length) for length in lengths),
        num_same_titles=len(same),
        same_titles=tuple(dict.fromkeys(same))[:_NUM_EXAMPLES],
        ratings=_ratings(interactions, config.like_threshold),
        split=split,
        problems=tuple(problems),
    )


def _usable_rows(
    tables: SourceTables, columns: ColumnsConfig, config: DataConfig, problems: list[str]
) -> RawInteractions:
    """The rows that can be used, also where so many cannot that training would stop."""
    try:
        return validate(tables, columns, config.max_bad_rows)
    except DataError as error:
        try:
            raw = validate(tables, columns, max_bad_rows=1.0)
        except DataError:
            raise error from None
        if not raw.users:
            raise
        problems.append(str(error))
        return raw


def _same_titles(catalogue: Catalogue) -> list[str]:
    """The title of each item whose title an earlier item has."""
    met: set[str] = set()
    same = []
    for title in catalogue.fields[TITLE]:
        if title in met:
            same.append(title)
        met.add(title)
    return same


def _ratings(interactions: Interactions, threshold: float) -> Ratings | None:
    ratings = interactions.ratings
    if ratings is None:
        return None
    liked = ratings >= threshold
    per_user = np.add.reduceat(liked, interactions.offsets[:-1], dtype=np.int64)
    both = (per_user > 0) & (per_user < np.diff(interactions.offsets))
    return Ratings(
        low=float(ratings.min()),
        high=float(ratings.max()),
        threshold=threshold,
        share_liked=float(liked.mean()),
        num_users_with_both=int(both.sum()),
    )


def _times_text(times: tuple[int, int] | None) -> str:
    if times is None:
        return "none; the rows are taken in the order of the file"
    first, last = times
    if _UNIX_SECONDS[0] <= first and last < _UNIX_SECONDS[1]:
        days = (datetime.fromtimestamp(time, UTC).date().isoformat() for time in times)
        return " to ".join(days)
    return f"{first} to {last}, taken as an order: these are not seconds since 1970"


def _lengths_text(lengths: tuple[int, ...]) -> str:
    low, tenth, median, ninth, high = lengths
    return f"{low} to {high}, median {median}; 80 % of users have {tenth} to {ninth}"


def _titles_text(num_same: int, examples: tuple[str, ...]) -> str:
    if not num_same:
        return "all different"
    shown = ", ".join(map(repr, examples))
    return f"{num_same:,} items have the title of an earlier item, such as {shown}"


def _ratings_text(ratings: Ratings | None, num_users: int) -> str:
    if ratings is None:
        return "none; the task like needs a column (data.columns.rating)"
    text = (
        f"{ratings.low:g} to {ratings.high:g}; {ratings.share_liked:.0%} are likes, which are "
        f"{ratings.threshold:g} and above (data.like_threshold); {ratings.num_users_with_both:,} "
        f"of {num_users:,} users have likes and other ratings"
    )
    if not ratings.num_users_with_both:
        text += ", so that the task like cannot be measured: change data.like_threshold"
    return text
