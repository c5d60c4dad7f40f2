"""The section ``data``: where the interactions come from, and how they are split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from pfm_llm.config.choices import Repeats, SplitKind
from pfm_llm.config.model import Fraction, PositiveCount, Settings

EMBEDDED_SOURCES = ("movielens-100k", "completejourney")
"""The sources that pfm_llm fetches by itself."""

RECOGNISED = "auto"
"""In place of the rating's column: the first usual name that is there, if there is one."""

BUILDERS = ("csv", "json", "parquet", "arrow", "text", "xml", "webdataset")
"""Names that `datasets` takes for a way of reading files, and not for a data set."""

_TAB = ("\\t", "tab")


class ColumnsConfig(Settings):
    """Column names in the tables of a source.

    A role at its default is also recognised by other usual names, such as ``userId`` or ``asin``.
    A name that is given wins.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # pandas names columns 0, 1, 2

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = Field("timestamp", description="None: the rows are in order")
    rating: str | None = Field(
        RECOGNISED, description="auto: recognised, if there are ratings; null: no ratings are read"
    )
    title: str = Field("title", description="the item's text, in the items file or in each row")
    items_item: str | None = Field(
        None, description="the item's id in the items file; None: as item, or recognised"
    )
    text: tuple[str, ...] | None = Field(
        None,
        description="columns that describe an item beside its title; None: all of the items file",
        exclude_if=lambda value: value is None,
    )


class ReadingConfig(Settings):
    """How a text file is laid out; what is None here is inferred from the file."""

    separator: str | None = Field(None, description="between fields, such as ';' or tab")
    encoding: str | None = Field(None, description="such as utf-8, latin-1, cp1252, utf-16")
    header: bool | None = Field(
        None,
        description="whether the first line names the columns; if not they are named by their "
        "content, or column_1, column_2, … where columns has such a name",
    )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not inferred."""
        return {k: v for k in ReadingConfig.model_fields if (v := getattr(self, k)) is not None}

    @field_validator("separator")
    @classmethod
    def _separates(cls, value: str | None) -> str | None:
        if value in _TAB:
            return "\t"
        if value is not None and (not value or any(mark in value for mark in '"\n\r')):
            raise ValueError("give the characters between two fields, such as ';', '|' or tab")
        return value

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except (LookupError, ValueError):
            raise ValueError(
                f"{value!r} is no encoding of text; usual ones are utf-8, latin-1, cp1252, utf-16"
            ) from None
        return value


class SourceReadingConfig(ReadingConfig):
    """How the text file of the source is laid out, and that of the items."""

    items: ReadingConfig = Field(ReadingConfig(), description="the same for data.items")


class HubTableConfig(Settings):
    """A table of a data set of the Hugging Face Hub, or of files that `datasets` can read."""

    name: str = Field(description="id of the data set; or csv, json, parquet, … with files")
    config: str | None = Field(None, description="its configuration, if it has several")
    split: str | None = Field(None, description="None: train, or the only one")
    revision: str | None = Field(None, description="branch, tag or commit; None: main")
    files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = Field(
        None, description="files of the data set, or paths, or split to these; None: all"
    )
    streaming: bool = Field(
        False, description="read row by row; keep the columns that are used, and no files"
    )
    max_rows: PositiveCount | None = Field(None, description="read at most so many rows")

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        # Without files a builder reads all of the working folder.
        if self.name in BUILDERS and not self.files:
            raise ValueError(f"{self.name} is no data set but reads files; name them in files")
        return self


class HubConfig(HubTableConfig):
    """The data set of the interactions, and that of the items."""

    items: HubTableConfig | None = Field(None, description="item texts, if not in the data set")


class DataConfig(Settings):
    """The source of the interactions, and how they are split."""

    source: str = Field(
        "movielens-100k",
        description="movielens-100k or completejourney (embedded); a CSV, TSV, JSON or Parquet "
        "file; a folder of parts, MovieLens, RecBole, MIND or save_to_disk; a `datasets` "
        "id. A path is looked for beside the config first",
    )
    items: str | None = Field(None, description="file of item texts, if not in source")
    hub: HubConfig | None = Field(
        None,
        description="a data set of the Hub in place of source, with configuration, split, revision",
        exclude_if=lambda value: value is None,
    )
    columns: ColumnsConfig = ColumnsConfig()
    # Not dumped while all is inferred: hashes of earlier settings stay as they are.
    reading: SourceReadingConfig = Field(
        SourceReadingConfig(),
        description="what text files are read as, where it is inferred wrongly",
        exclude_if=lambda value: value == SourceReadingConfig(),
    )
    day_first: bool | None = Field(
        None,
        description="whether 01/02/2020 is the first of February; None: another date tells it",
        exclude_if=lambda value: value is None,
    )
    repeats: Repeats = Repeats.FIRST_ONLY
    split: SplitKind = SplitKind.LEAVE_LAST_OUT
    held_out: Fraction = Field(0.2, description="held-out share of the other two splits")
    hold_out_items: Fraction = Field(
        0.0,
        description="share of the items that are in no training and no query's history: as targets "
        "they are new items",
        exclude_if=lambda value: not value,
    )
    keep_ties: bool = Field(False, description="never split events of a user with equal timestamps")
    like_threshold: float = Field(4.0, description="ratings from this value up count as likes")
    min_interactions: PositiveCount = Field(3, description="users with fewer are dropped")
    max_users: PositiveCount | None = Field(None, description="keep a random sample of this size")
    met_items_only: bool = Field(False, description="drop items that nobody of the users met")
    max_bad_rows: Fraction = Field(0.01, description="an error above this share of bad rows")
    users_per_client: PositiveCount = Field(1, description="1: a client is a user; else a silo")

    @model_validator(mode="before")
    @classmethod
    def _named_by_hub(cls, tree: Any) -> Any:
        """The name of a data set of the Hub is that of the source; one of them is enough."""
        hub = tree.get("hub") if isinstance(tree, Mapping) else None
        if isinstance(hub, str):
            hub = {"name": hub}
        if isinstance(hub, Mapping) and "name" not in hub and "source" in tree:
            hub = {**hub, "name": tree["source"]}
        name = hub.get("name") if isinstance(hub, Mapping) else getattr(hub, "name", None)
        return {**tree, "hub": hub, "source": tree.get("source", name)} if name else tree

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.hub is not None and self.source != self.hub.name:
            raise ValueError("source and hub name two data sets; leave one of them out")
        if self.hub is not None and self.hub.items is not None and self.items is not None:
            raise ValueError("items and hub.items name two tables; leave one of them out")
        return self


def beside(folder: Path, key: str, value: Any) -> Any:
    """A value of the section; a path that is there in the folder of the config begins there.

    Args:
        folder: The folder of the config.
        key: A key of the section.
        value: Its value as the config has it.
    """
    if key == "hub" and isinstance(value, dict):
        nested = {"files": value.get("files"), "items": value.get("items")}
        return value | {k: _files_beside(folder, v) for k, v in nested.items() if v is not None}
    if key not in ("source", "items") or not isinstance(value, str) or value in EMBEDDED_SOURCES:
        return value
    place, here = folder / value, Path(value)
    if not place.exists() or (here.exists() and here.samefile(place)):
        return value
    return str(place)


def _files_beside(folder: Path, value: Any) -> Any:
    """Files of ``hub``, alone, in a list, or in a mapping at any depth."""
    if isinstance(value, dict):
        paths = {key: _files_beside(folder, own) for key, own in value.items()}
        return paths | {key: value[key] for key in ("name", "config", "split") if key in value}
    if isinstance(value, list):
        return [_files_beside(folder, own) for own in value]
    return beside(folder, "source", value)
