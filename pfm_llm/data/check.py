"""A check of a source before training: the rows that are read or dropped, and the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.base.terminal import harmless
from pfm_llm.config.data import RECOGNISED, ColumnsConfig, DataConfig
from pfm_llm.config.schema import parse_config, read_yaml
from pfm_llm.config.text import apply_override, set_setting
from pfm_llm.data.columns import USUAL, as_block, resolve
from pfm_llm.data.interactions import TITLE, Interactions, RawInteractions, build_interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.rows import text_columns, validate
from pfm_llm.data.sources import read_source
from pfm_llm.data.splits import split_interactions
from pfm_llm.data.tables import SourceTables
from pfm_llm.data.times import DATES, Times, parse_times

_OPTIONAL = ("timestamp", "rating")
_CONFIGS = (".yaml", ".yml")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUM_EXAMPLES = 3
_MIN_TRAINED = 2


@dataclass(frozen=True)
class DataCheck:
    """The result of a check of a source.

    Attributes:
        config: The section ``data`` of the check, without ratings if a column that looks like them
            was not read.
        columns: Role to its column; None if no column has the role.
        unused: Columns of the interactions that have no role.
        texts: Columns that may describe an item beside its title.
        interactions: The interactions that training would use.
        report: The rows that were read and dropped.
        read_as: Table to what its reader inferred: separator, header, encoding.
        reading: The block ``data.reading`` that says what was inferred; empty if nothing was.
        times: The first and the last time, and their unit, in words.
        split: A description of the split; None if splitting fails.
        problems: The reasons for which training would fail; empty if it would not.
        has_config_columns: Whether ``data.columns`` names the columns, and not the format.
    """

    config: DataConfig
    columns: Mapping[str, str | None]
    unused: tuple[str, ...]
    texts: tuple[str, ...]
    interactions: Interactions
    report: LoadReport
    read_as: Mapping[str, tuple[str, ...]]
    reading: Mapping[str, object]
    times: str
    split: str | None
    problems: tuple[str, ...]
    has_config_columns: bool = True

    def describe(self) -> str:
        """All of it as lines of text; the last ones are a block for a config."""
        lines = [f"source: {self.config.source}"]
        if self.config.items is not None:
            lines.append(f"items: {self.config.items}")
        lines += [
            harmless(f"{name}: {', '.join(told)}") for name, told in self.read_as.items() if told
        ]
        if self.reading:
            lines.append(_otherwise("read it otherwise", "reading", self.reading))
        roles = (f"{role} = {self._told(role)}" for role in self.columns)
        lines.append(harmless(f"columns: {', '.join(roles)}; data.columns names others"))
        is_recognised = self.has_config_columns and self.config.columns.rating == RECOGNISED
        if is_recognised and self.columns["rating"] is not None:
            lines.append(_otherwise("read no ratings", "columns", {"rating": None}))
        if self.unused:
            lines.append(harmless(f"columns that are not read: {', '.join(self.unused)}"))
        lines += [
            *self._told_texts(),
            self.report.describe(),
            f"time: {self.times}",
            f"events of a user: {_lengths_text(self.interactions)}",
            f"titles: {_titles_text(self.interactions.catalogue.fields[TITLE])}",
            f"ratings: {_ratings_text(self.interactions, self.config.like_threshold)}",
        ]
        if self.split is not None:
            lines.append("split: " + self.split.replace("\n", "\n  "))
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "", "The block for a config:", "", self.block()])

    def _told_texts(self) -> list[str]:
        lines = [harmless(f"texts of an item: {', '.join(self.interactions.catalogue.fields)}")]
        if self.texts:
            lines.append(_otherwise("choose other texts", "columns", {"text": list(self.texts)}))
        return lines

    def _told(self, role: str) -> str:
        """The column of a role, and whether it was recognised by its name."""
        name, asked = self.columns[role], getattr(self.config.columns, role, None)
        return f"{name} (recognised)" if name is not None and name != asked else name or "none"

    def block(self) -> str:
        """The block ``data:`` of a config that reads this source, as YAML."""
        given = self.config.model_dump(mode="json", exclude_defaults=True)
        data: dict[str, Any] = {"source": self.config.source}
        if self.config.items is not None:
            data["items"] = self.config.items
        if self.has_config_columns:
            asked = self.config.columns
            data["columns"] = {
                role: name
                for role, name in self.columns.items()
                if name is not None or getattr(asked, role) is None
            }
        if (texts := self.config.columns.text) is not None:
            data["columns"] = {**data.get("columns", {}), "text": list(texts)}
        return as_block({"data": data | {k: v for k, v in given.items() if k not in data}})


def data_config(
    source: str,
    items: str | None = None,
    columns: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> DataConfig:
    """The section ``data`` of a config, from what a command line says.

    Args:
        source: As ``data.source``; or a config, a YAML file, whose section is taken.
        items: As ``data.items``.
        columns: ``role=name`` for roles whose column is not named as by default;
            ``timestamp=null`` and ``rating=null`` say that there is none.
        overrides: ``data.key=value`` for other settings of the section, values in YAML.

    Raises:
        ConfigError: An entry of ``columns`` or ``overrides`` has another form or names nothing
            that is there, or the config cannot be read.
    """
    is_config = Path(source).suffix.lower() in _CONFIGS
    tree = read_yaml(source) if is_config else {"name": "data", "data": {"source": source}}
    named: dict[str, str | None] = {}
    for entry in columns:
        role, _, name = entry.partition("=")
        if not name or role not in USUAL:
            raise ConfigError(
                f"column {entry!r}: write role=name, with one of the roles {', '.join(USUAL)}"
            )
        named[role] = None if name == "null" and role in _OPTIONAL else name
    given = {f"columns.{role}": name for role, name in named.items()}
    for key, value in {**given, **({} if items is None else {"items": items})}.items():
        set_setting(tree, f"data.{key}", value)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, origin=source).data


def check_data(config: DataConfig) -> DataCheck:
    """Read a source like training does, but without a cache, and describe the result.

    Args:
        config: The section ``data``.

    Returns:
        The result; ``problems`` has the reasons for which training would refuse the data.

    Raises:
        DataError: The source or a column is missing, or no row can be used.
        AssetError: The embedded data set cannot be fetched.
    """
    tables, columns = read_source(config)
    problems: list[str] = []
    raw = _usable_rows(tables, columns, config, problems)
    interactions, report = build_interactions(raw, config, seed=0)
    split = _split_text(interactions, config, problems)
    has_config_columns = columns == config.columns
    found = resolve(tables, columns)
    if found.rating is not None and interactions.ratings is None:
        # Recognised by its name and not read. Named in the block, its gaps would be bad rows.
        found = replace(found, rating=None)
        if has_config_columns:
            unread = config.columns.model_copy(update={"rating": None})
            config = config.model_copy(update={"columns": unread})
    roles: dict[str, str | None] = found.as_config().model_dump()
    read = {*roles.values(), *((columns.text or ()) if tables.items is None else ())}
    if roles["items_item"] is None:
        del roles["items_item"]
    rows, times = tables.interactions, found.timestamp
    return DataCheck(
        config=config,
        columns=roles,
        unused=tuple(c for c in rows.header if c not in read),
        texts=tuple(text_columns(tables, found)),
        read_as={t.name: t.inferred for t in (rows, tables.items, tables.users) if t is not None},
        reading=_reading(tables),
        times=_times_text(
            interactions.timestamps,
            parse_times(rows.columns[times] if times else (), config.day_first),
        ),
        has_config_columns=has_config_columns,
        interactions=interactions,
        report=report,
        split=split,
        problems=tuple(problems),
    )


def _usable_rows(
    tables: SourceTables, columns: ColumnsConfig, config: DataConfig, problems: list[str]
) -> RawInteractions:
    """The rows that can be used, also where so many cannot that training would stop."""
    try:
        return validate(tables, columns, config.max_bad_rows, config.day_first)
    except DataError as error:
        raw = validate(tables, columns, 1.0, config.day_first)
        if not raw.users:
            raise
        problems.append(str(error))
        return raw


def _split_text(interactions: Interactions, config: DataConfig, problems: list[str]) -> str | None:
    """A description of the split, None if there can be none; adds its problems."""
    try:
        parts = split_interactions(interactions, config)
    except DataError as error:
        problems.append(str(error))
        return None
    if np.diff(parts.train.interactions.offsets).max() < _MIN_TRAINED:
        problems.append(
            "no user has two events to train on; give longer histories, or hold out less "
            "(data.split, data.held_out)"
        )
    return parts.describe()


def _otherwise(aim: str, key: str, value: Mapping[str, object]) -> str:
    """The line of a config that says something else than what was inferred."""
    line = yaml.safe_dump(
        value, sort_keys=False, default_flow_style=True, allow_unicode=True, width=1000
    )
    return harmless(f"to {aim}, put this under data: and change it: {key}: {line.strip()}")


def _reading(tables: SourceTables) -> dict[str, object]:
    """What was inferred of the layout of both tables, as ``data.reading``."""
    told: dict[str, object] = dict(tables.interactions.layout)
    if tables.items is not None and tables.items.layout:
        told["items"] = dict(tables.items.layout)
    return told


def _times_text(times: np.ndarray | None, parsed: Times) -> str:
    if times is None:
        return "none; the rows are taken in the order of the file"
    first, last = times.min().item(), times.max().item()
    if parsed.per_second is None:
        return f"{first} to {last}, taken as an order: these are not seconds since 1970"
    days = (_EPOCH + timedelta(seconds=time / parsed.per_second) for time in (first, last))
    unit = parsed.unit if parsed.unit == DATES else f"{parsed.unit} since 1970"
    if parsed.day_first is not None:
        unit += f" with the {'day' if parsed.day_first else 'month'} first; data.day_first: "
        unit += f"{str(not parsed.day_first).lower()} reads them otherwise"
    return f"{' to '.join(day.date().isoformat() for day in days)}, from {unit}"


def _lengths_text(interactions: Interactions) -> str:
    lengths = np.diff(interactions.offsets)
    low, tenth, median, ninth, high = np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1), method="nearest")
    return f"{low} to {high}, median {median}; 80 % of users have {tenth} to {ninth}"


def _titles_text(titles: Sequence[str]) -> str:
    every = pd.Series(titles)
    same = every[every.duplicated()]
    if same.empty:
        return "all different"
    shown = ", ".join(map(repr, same.unique()[:_NUM_EXAMPLES]))
    return f"{len(same):,} items have the title of an earlier item, such as {shown}"


def _ratings_text(interactions: Interactions, threshold: float) -> str:
    ratings = interactions.ratings
    if ratings is None:
        return "none; the task like needs a column (data.columns.rating)"
    liked = ratings >= threshold
    num_liked = np.add.reduceat(liked, interactions.offsets[:-1], dtype=np.int64)
    num_both = int(((num_liked > 0) & (num_liked < np.diff(interactions.offsets))).sum())
    text = (
        f"{ratings.min():g} to {ratings.max():g}; {liked.mean():.0%} are likes, which are "
        f"{threshold:g} and above (data.like_threshold); {num_both:,} of "
        f"{interactions.num_users:,} users have likes and other ratings"
    )
    if not num_both:
        text += ", so that the task like cannot be measured: change data.like_threshold"
    return text
