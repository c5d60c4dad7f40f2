"""Amazon's reviews: the title in a review is that of the review, and not of the item."""

from dataclasses import replace

from pfm_llm.data.tables import LazyColumns, Table

_SIGNS = {"title", "parent_asin", "user_id"}
"""Columns of a review of 2023; the metadata of items has no user."""

_RENAMED = "summary"


def without_review_titles(table: Table) -> Table:
    """The table, in which the title of a review is called ``summary``, as until 2018.

    Other tables are returned unchanged.
    """
    if not set(table.header) >= _SIGNS:
        return table
    old = {name: name for name in table.header if name != "title"} | {_RENAMED: "title"}
    names = [_RENAMED if name == "title" else name for name in table.columns]
    return replace(
        table,
        header=tuple(_RENAMED if name == "title" else name for name in table.header),
        columns=LazyColumns(names, lambda name: table.columns[old[name]]),
        inferred=(*table.inferred, f"Amazon reviews: their title is called {_RENAMED}"),
    )
