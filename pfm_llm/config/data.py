"""The section ``data``: where the interactions come from, and how they are split."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from pfm_llm.config.choices import Repeats, SplitKind
from pfm_llm.config.model import Fraction, PositiveCount, Settings

EMBEDDED_SOURCES = ("movielens-100k", "completejourney")
"""The sources that pfm_llm fetches by itself."""


class ColumnsConfig(Settings):
    """Column names in the tables of a source.

    A role at its default is also recognised by other usual names, such as ``userId`` or ``asin``.
    A name that is given wins.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # pandas names columns 0, 1, 2

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = Field("timestamp", description="None: the rows are in order")
    rating: str | None = Field(None, description="None: recognised, if there are ratings")
    title: str = Field("title", description="the item's text, in the items file or in each row")
    items_item: str | None = Field(
        None, description="the item's id in the items file; None: as item, or recognised"
    )


class DataConfig(Settings):
    """The source of the interactions, and how they are split."""

    source: str = Field(
        "movielens-100k",
        description="movielens-100k or completejourney (embedded); a CSV, TSV, JSON or Parquet "
        "file; a folder of Parquet parts, MovieLens, RecBole, MIND or save_to_disk; a `datasets` "
        "id. A path is looked for beside the config first",
    )
    items: str | None = Field(None, description="file of item texts, if not in source")
    columns: ColumnsConfig = ColumnsConfig()
    repeats: Repeats = Repeats.FIRST_ONLY
    split: SplitKind = SplitKind.LEAVE_LAST_OUT
    held_out: Fraction = Field(0.2, description="held-out share of the other two splits")
    hold_out_items: Fraction = Field(
        0.0,
        description="share of the items that are in no training and no query's history: as targets "
        "they are new items",
    )
    keep_ties: bool = Field(False, description="never split events of a user with equal timestamps")
    like_threshold: float = Field(4.0, description="ratings from this value up count as likes")
    min_interactions: PositiveCount = Field(3, description="users with fewer are dropped")
    max_users: PositiveCount | None = Field(None, description="keep a random sample of this size")
    met_items_only: bool = Field(False, description="drop items that nobody of the users met")
    max_bad_rows: Fraction = Field(0.01, description="an error above this share of bad rows")
    users_per_client: PositiveCount = Field(1, description="1: a client is a user; else a silo")


def beside(folder: Path, key: str, value: Any) -> Any:
    """A value of the section; a path that is there in the folder of the config begins there.

    Args:
        folder: The folder of the config.
        key: A key of the section.
        value: Its value as the config has it.
    """
    if key not in ("source", "items") or not isinstance(value, str) or value in EMBEDDED_SOURCES:
        return value
    place, here = folder / value, Path(value)
    if not place.exists() or (here.exists() and here.samefile(place)):
        return value
    return str(place)
