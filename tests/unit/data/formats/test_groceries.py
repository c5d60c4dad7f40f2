"""The Complete Journey from a handful of made-up rows: what is an item, and what is left out."""

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pfm_llm.base.assets import GROCERY_FILES
from pfm_llm.base.errors import DataError
from pfm_llm.config.data import DataConfig
from pfm_llm.data import sources
from pfm_llm.data.formats import groceries
from pfm_llm.data.formats.groceries import COLUMNS, MIN_PRODUCTS, plain_words, read_groceries
from pfm_llm.data.formats.grocery_words import WORDS
from pfm_llm.data.rows import validate
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.tables import SourceTables

MILK, LEAN, HAM, CHIPS = 10, 20, 30, 40
"""First product number of each item; a type has `MIN_PRODUCTS` products unless said otherwise."""
RARE, NAMELESS, COUPON, FUEL, GIFT = 100, 101, 102, 103, 104


def products(**changes: Any) -> pd.DataFrame:
    rows = [
        *named(MILK, "GROCERY", "FLUID  MILK", "FLUID MILK WHITE ONLY"),
        *named(LEAN, "MEAT", "BEEF", "LEAN"),
        *named(HAM, "DELI", "DELI MEATS", "HAM BULK"),
        *named(CHIPS, "GROCERY", "BAG SNACKS", "POTATO CHIPS"),
        *named(RARE, "MEAT", "VEAL", "LEAN", 1),
        *named(NAMELESS, "MISCELLANEOUS", None, None, 1),
        *named(COUPON, "GROCERY", "COUPON/MISC ITEMS", "JUICE", 1),
        *named(FUEL, "FUEL", "OTHER", "UNLEADED", 1),
        *named(GIFT, "DRUG GM", "TOYS", "GIFT CARDS", 1),
    ]
    return pd.DataFrame(rows).assign(manufacturer_id=1, **changes)


def named(
    first: int, department: str, category: str | None, kind: str | None, count: int = MIN_PRODUCTS
) -> list[dict[str, Any]]:
    fields = {"department": department, "product_category": category, "product_type": kind}
    return [{"product_id": first + number, **fields} for number in range(count)]


def write(
    folder: Path, purchases: list[tuple[int, int, int, int]], table: pd.DataFrame | None = None
) -> Path:
    """A source of (household, basket, product, quantity); basket b is paid at b seconds."""
    rows = pd.DataFrame(purchases, columns=["household_id", "basket_id", "product_id", "quantity"])
    rows["transaction_timestamp"] = pd.to_datetime(rows["basket_id"], unit="s")
    rows["sales_value"] = 1.0
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / "transactions.parquet")
    (products() if table is None else table).to_parquet(folder / "products.parquet")
    people = pd.DataFrame({"household_id": [7], "age": ["65+"], "home_ownership": [None]})
    people.to_parquet(folder / "demographics.parquet")
    return folder


def events(tables: SourceTables) -> list[tuple[str, str, str]]:
    columns = tables.interactions.columns
    return list(zip(columns["household_id"], columns["item_id"], columns["timestamp"], strict=True))


def notes(tables: SourceTables) -> dict[str, int]:
    """What was left out, by the first words of the reason."""
    return {
        reason.split(" of ")[0].split(" (")[0]: int(count.split()[0].replace(",", ""))
        for count, _, reason in (note.partition(" left out: ") for note in tables.notes)
        if reason
    }


def test_an_item_is_a_category_and_a_type_and_a_basket_holds_it_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        [(7, 5, MILK, 1), (7, 5, MILK + 1, 2), (7, 6, MILK, 1), (8, 9, HAM, 1)],
    )
    tables = read_groceries(folder)
    milk, ham = "FLUID MILK / FLUID MILK WHITE ONLY", "DELI MEATS / HAM BULK"
    assert events(tables) == [("7", milk, "5"), ("7", milk, "6"), ("8", ham, "9")]
    assert tables.interactions.positions == [1, 3, 4]  # rows of the source
    assert notes(tables)["another product"] == 1
    assert tables.notes[0] == "4 rows of purchases in the source"
    assert tables.items is not None
    assert sorted(tables.items.columns["item_id"]) == sorted(
        [milk, ham, "BEEF / LEAN", "BAG SNACKS / POTATO CHIPS"]
    )


def test_what_is_no_purchase_of_a_product_is_left_out_and_counted(tmp_path: Path) -> None:
    gone = [NAMELESS, 999, COUPON, FUEL, GIFT, RARE]  # 999 is in no table
    purchases = [(7, 1, product, 1) for product in gone] + [(7, 1, LEAN, 0), (7, 1, HAM, 1)]
    tables = read_groceries(write(tmp_path, purchases))
    assert [item for _, item, _ in events(tables)] == ["DELI MEATS / HAM BULK"]
    assert notes(tables) == {
        "product without a category and a type": 2,
        "coupons, fuel and other non-products": 3,
        "nothing bought": 1,
        "item": 1,
        "another product": 0,
    }


@pytest.mark.parametrize(("count", "is_item"), [(MIN_PRODUCTS - 1, False), (MIN_PRODUCTS, True)])
def test_an_item_has_enough_products_whoever_bought_them(
    count: int, is_item: bool, tmp_path: Path
) -> None:
    table = pd.DataFrame(
        named(1, "PRODUCE", "ROOTS", "BEETS RED", count) + named(50, "PRODUCE", "ROOTS", "YAMS RED")
    )
    bought_often = [(household, household, 1, 1) for household in range(50)]
    tables = read_groceries(write(tmp_path, [*bought_often, (1, 99, 50, 1)], table))
    assert tables.items is not None
    assert ("ROOTS / BEETS RED" in tables.items.columns["item_id"]) is is_item
    assert "ROOTS / YAMS RED" in tables.items.columns["item_id"]


def test_titles_tell_items_apart_and_have_category_and_department_beside_them(
    tmp_path: Path,
) -> None:
    table = pd.DataFrame(
        [
            *named(1, "MEAT", "BEEF", "LEAN"),
            *named(11, "GROCERY", "SHELF STABLE", "SWEET PEAS"),
            *named(21, "PRODUCE", "FRESH", "SWEET PEAS"),
            *named(31, "GROCERY", "BAG SNACKS", "POTATO CHIPS"),
            *named(36, "DELI", "BAG SNACKS", "POTATO CHIPS", 1),
        ]
    )
    items = read_groceries(write(tmp_path, [(1, 1, 1, 1)], table)).items
    assert items is not None
    rows = zip(*(items.columns[name] for name in ("title", "category", "department")), strict=True)
    assert list(rows) == [
        ("Potato chips", "Bag snacks", "Grocery"),  # five products against one of the deli
        ("Lean, beef", "Beef", "Meat"),  # a single word says too little
        ("Sweet peas, fresh", "Fresh", "Produce"),
        ("Sweet peas, shelf stable", "Shelf stable", "Grocery"),
    ]


def test_the_order_inside_a_basket_is_drawn_once_and_not_that_of_product_numbers(
    tmp_path: Path,
) -> None:
    table = pd.DataFrame(
        [row for n in range(40) for row in named(100 + 10 * n, "MEAT", "BEEF", f"CUT {n:02d}")]
    )
    purchases = [(7, basket, 100 + 10 * n, 1) for basket in (1, 2) for n in range(40)]
    first = events(read_groceries(write(tmp_path / "a", purchases, table)))
    again = events(read_groceries(write(tmp_path / "b", purchases, table)))
    assert first == again
    assert [time for _, _, time in first] == ["1"] * 40 + ["2"] * 40
    orders = [[item for _, item, _ in first[:40]], [item for _, item, _ in first[40:]]]
    assert sorted(orders[0]) == sorted(orders[1])
    rising = sum(a < b for order in orders for a, b in itertools.pairwise(order))
    assert 20 < rising < 58  # of 78 pairs; 39 is chance
    assert orders[0] != orders[1]


def test_households_bring_what_the_survey_asked(tmp_path: Path) -> None:
    tables = read_groceries(write(tmp_path, [(7, 1, MILK, 1), (8, 2, HAM, 1)]))
    assert tables.users is not None
    assert dict(tables.users.columns) == {
        "household_id": ["7"], "age": ["65+"], "home_ownership": [""],
    }  # fmt: skip
    raw = validate(tables, COLUMNS, max_bad_rows=0)
    assert raw.user_fields == {"age": {"7": "65+"}, "home_ownership": {"7": ""}}
    assert raw.num_bad == {}
    assert raw.ratings is None


def test_it_is_an_embedded_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    purchases = [(7, 5, MILK, 1), (7, 5, CHIPS, 1), (7, 6, MILK, 1), (8, 9, HAM, 1)]
    folder = write(tmp_path / "source", purchases)
    monkeypatch.setattr(sources.assets, "completejourney", lambda: folder)
    config = DataConfig(source="completejourney", min_interactions=1)
    interactions, report = load_interactions(config, seed=0)
    assert interactions.user_ids == ("7", "8")
    assert sorted(len(interactions.history(user)) for user in range(2)) == [1, 2]  # MILK once
    assert set(interactions.catalogue.fields) == {"title", "category", "department"}
    assert interactions.user_fields["age"] == ("65+", "")
    assert "4 rows of purchases in the source" in report.notes
    with pytest.raises(DataError, match=r"data\.items: x\.csv cannot be used with completejourney"):
        load_interactions(config.model_copy(update={"items": "x.csv"}), seed=0)
    with pytest.raises(DataError, match=r"did you mean completejourney\?"):
        load_interactions(config.model_copy(update={"source": "complete-journey"}), seed=0)


@pytest.mark.parametrize("damage", ["missing", "not parquet", "no column"])
@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_damaged_file_is_named(damage: str, file: int, tmp_path: Path) -> None:
    folder = write(tmp_path, [(7, 5, MILK, 1)])
    path = folder / GROCERY_FILES[file]
    if damage == "missing":
        path.unlink()
    elif damage == "not parquet":
        path.write_bytes(b"PAR1 and no more")
    else:
        pd.DataFrame({"other": [1]}).to_parquet(path)
    with pytest.raises(DataError, match=path.name):
        read_groceries(folder)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("FLUID MILK WHITE ONLY", "Fluid milk white only"),
        ("SFT DRNK SNGL SRV BTL CARB (EX", "Soft drink single serve bottle carbonated"),
        ("CANDY BARS (SINGLES)(INCLUDING", "Candy bars (singles)"),
        ("DIPS (NON-REFRIGERATED)", "Dips (non-refrigerated)"),
        ("SHORT (CUT", "Short (cut"),  # not as long as what the source cuts
        ("SW GDS:DONUTS", "Sweet goods: donuts"),
        ("MISC.CND SEAFOODS (CRABETC)", "Miscellaneous canned seafoods (crabetc)"),
        ("XMAS PLUSH", "Christmas plush"),
        ("8PK  ROLLS -", "8pack rolls"),
        ("", ""),
    ],
)
def test_names_in_plain_words(source: str, expected: str) -> None:
    assert plain_words(source) == expected


def test_abbreviations_are_capitals_and_what_they_stand_for_is_not() -> None:
    assert all(word == word.upper() for word in WORDS)
    assert all(text.lower() == text for word, text in WORDS.items() if word != "XMAS")
    assert not set(WORDS) & {text.upper() for text in WORDS.values()}
    assert groceries.MIN_PRODUCTS == 5
