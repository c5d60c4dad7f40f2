"""``pfm data``: a check of a data source before training."""

from collections.abc import Callable
from typing import Annotated

import typer

HELP = "Check a data source before training."


def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="CSV, TSV, JSON or Parquet file; folder of parts, MovieLens, RecBole, "
            "MIND or save_to_disk; `datasets` id; movielens-100k or completejourney; or a config "
            "(YAML), whose section data is checked.",
            show_default=False,
        ),
    ],
    items: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File of item texts, if not in SOURCE."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Column of user, item, timestamp, rating, title or items_item (the id in FILE), "
            "where its name is not recognised; timestamp=null: the rows are in order; "
            "rating=null: no ratings are read; may be repeated.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Try another setting, such as data.reading.header=false or "
            "data.hub.split=test; may be repeated.",
        ),
    ] = None,
) -> None:
    """Report what a source is read as, and which rows training would read or drop.

    The last lines are the block `data:` of a config. The exit code is 1 if training on the data
    would fail.
    """
    from pfm_llm.data.check import check_data, data_config

    checked = check_data(data_config(source, items, column or [], override or []))
    print(checked.describe())
    if checked.problems:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {"check": check}
