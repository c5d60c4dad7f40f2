"""``pfm data``: a look at one's own data before anything is trained."""

from collections.abc import Callable
from typing import Annotated

import typer

HELP = "Look at data before anything is trained."


def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="CSV, TSV or Parquet file, MovieLens folder, save_to_disk folder, `datasets` id, "
            "movielens-100k or completejourney.",
            show_default=False,
        ),
    ],
    items: Annotated[
        str | None, typer.Option(metavar="FILE", help="File of item texts, when apart.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="The column of user, item, timestamp, rating or title; timestamp and rating may "
            "be null; repeats.",
        ),
    ] = None,
) -> None:
    """Say what would be read and what would be dropped.

    The last lines are the block `data:` of a config. The exit code is 1 when training on the data
    would fail.
    """
    from pfm_llm.data.check import check_data, data_config

    checked = check_data(data_config(source, items, column or []))
    print(checked.describe())
    if checked.problems:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {"check": check}
