"""Validation: each fault has its line and reason, and too many faults stop the load."""

import dataclasses

import numpy as np
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.rows import NO_TEXT, NOT_A_RATING, NOT_A_TIME, validate
from pfm_llm.data.tables import BadRow, LazyColumns, SourceTables, Table

COLUMNS = ColumnsConfig(rating="rating")
ANY = 0.999


def table(name: str, /, **columns: list[str]) -> Table:
    num_rows = len(next(iter(columns.values())))
    return Table(name, tuple(columns), columns, range(2, num_rows + 2))  # line 1 is the header


ITEMS = table("items.csv", item_id=["a", "b"], title=["Ash", "Birch"], family=["Olive", ""])


def rows(**changes: list[str]) -> Table:
    columns = {
        "user_id": ["u", "v", "u"],
        "item_id": ["b", "a", "a"],
        "timestamp": ["3", "1", "2"],
        "rating": ["4", "0.5", "-1"],
    }
    return table("rows.csv", **{**columns, **changes})


def test_good_rows_stay_in_file_order_with_their_numbers() -> None:
    raw = validate(SourceTables(rows(), ITEMS), COLUMNS, max_bad_rows=0)
    assert raw.catalogue.item_ids == ("a", "b")
    assert raw.catalogue.fields == {"title": ("Ash", "Birch"), "family": ("Olive", "")}
    assert list(raw.users) == ["u", "v", "u"]
    assert raw.items.tolist() == [1, 0, 0]
    assert raw.timestamps is not None
    assert raw.ratings is not None
    assert raw.timestamps.tolist() == [3, 1, 2]
    assert raw.timestamps.dtype == np.int64
    assert raw.ratings.tolist() == [4, 0.5, -1]
    assert (raw.num_bad, raw.examples, raw.notes) == ({}, (), ())


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"user_id": ["u", "", "u"]}, "empty user id", ""),
        ({"item_id": ["b", "", "a"]}, "empty item id", ""),
        ({"item_id": ["b", "z", "a"]}, NO_TEXT, ": 'z'"),
        ({"timestamp": ["3", "soon", "2"]}, NOT_A_TIME, ": 'soon'"),
        ({"timestamp": ["3", "", "2"]}, NOT_A_TIME, ": ''"),
        ({"timestamp": ["3", "nan", "2"]}, NOT_A_TIME, ": 'nan'"),
        ({"timestamp": ["3", "1e400", "2"]}, NOT_A_TIME, ": '1e400'"),
        ({"timestamp": ["3", str(2**63), "2"]}, NOT_A_TIME, f": '{2**63}'"),
        ({"timestamp": ["3", "2020-13-01", "2"]}, NOT_A_TIME, ": '2020-13-01'"),
        ({"rating": ["4", "good", "5"]}, NOT_A_RATING, ": 'good'"),
        ({"rating": ["4", "2020-01-01", "5"]}, NOT_A_RATING, ": '2020-01-01'"),
    ],
)
def test_a_bad_row_is_left_out_counted_and_shown_with_its_line(
    changes: dict[str, list[str]], reason: str, detail: str
) -> None:
    raw = validate(SourceTables(rows(**changes), ITEMS), COLUMNS, ANY)
    assert list(raw.users) == ["u", "u"]
    assert raw.items.tolist() == [1, 0]
    assert raw.num_bad == {reason: 1}
    assert raw.examples == (f"rows.csv line 3: {reason}{detail}",)


def test_a_row_with_several_faults_counts_once() -> None:
    bad = rows(user_id=["", "v", "u"], timestamp=["x", "1", "2"], rating=["x", "x", "1"])
    raw = validate(SourceTables(bad, ITEMS), COLUMNS, ANY)
    assert raw.num_bad == {"empty user id": 1, NOT_A_RATING: 1}
    assert raw.items.tolist() == [0]


def test_torn_rows_and_bad_values_are_shown_in_order_of_lines() -> None:
    torn = dataclasses.replace(
        rows(user_id=["u", "v", ""]), bad=(BadRow(9, "torn", "x"), BadRow(1, "torn", "y"))
    )
    raw = validate(SourceTables(torn, ITEMS), COLUMNS, ANY)
    assert raw.num_bad == {"torn": 2, "empty user id": 1}
    assert raw.examples == (
        "rows.csv line 1: torn: y",
        "rows.csv line 4: empty user id",
        "rows.csv line 9: torn: x",
    )


def test_the_limit_is_a_share_of_all_rows_and_the_share_itself_passes() -> None:
    bad = rows(rating=["4", "x", "5"])
    torn = dataclasses.replace(bad, bad=(BadRow(5, "torn", ""),))
    tables = SourceTables(torn, ITEMS)
    assert validate(tables, COLUMNS, max_bad_rows=0.5).num_bad  # 2 of 4
    with pytest.raises(DataError) as caught:
        validate(tables, COLUMNS, max_bad_rows=0.49)
    assert str(caught.value).splitlines() == [
        "rows.csv: 2 of 4 rows cannot be used, more than data.max_bad_rows: 0.49 allows; "
        "correct them or raise it",
        f"  1 rows: {NOT_A_RATING}",
        "  1 rows: torn",
        f"  rows.csv line 3: {NOT_A_RATING}: 'x'",
        "  rows.csv line 5: torn",
    ]


def test_one_bad_row_is_too_many_when_none_are_allowed() -> None:
    with pytest.raises(DataError, match="1 of 3 rows"):
        validate(SourceTables(rows(user_id=["u", "v", ""]), ITEMS), COLUMNS, max_bad_rows=0)


def test_at_most_five_rows_are_shown() -> None:
    many = table("rows.csv", user_id=[""] * 9 + ["u"], item_id=["a"] * 10)
    columns = ColumnsConfig(timestamp=None)
    raw = validate(SourceTables(many, ITEMS), columns, ANY)
    assert [example.split(":")[0] for example in raw.examples] == [
        f"rows.csv line {line}" for line in (2, 3, 4, 5, 6)
    ]
    assert raw.num_bad == {"empty user id": 9}
    assert raw.timestamps is None
    assert raw.ratings is None


def test_the_items_file_has_the_same_limit_and_its_first_row_for_an_id_counts() -> None:
    items = table(
        "items.csv",
        item_id=["a", "b", "", "a", "c"],
        title=["Ash", "Birch", "Nameless", "Alder", ""],
    )
    raw = validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0.4)
    assert raw.catalogue.item_ids == ("a", "b")
    assert raw.catalogue.fields["title"] == ("Ash", "Birch")
    assert raw.notes == (
        "items.csv: bad rows left out: 1 empty item id, 1 item without text; "
        "items.csv line 4: empty item id",
        "items.csv: 1 rows repeat an id; the first row counts",
    )
    with pytest.raises(DataError, match=r"items\.csv: 2 of 5 rows cannot be used"):
        validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0.3)


def test_repeated_ids_are_counted_right_beside_torn_and_empty_rows() -> None:
    items = table("items.csv", item_id=["a", "a", ""], title=["Ash", "Ash", "x"])
    torn = dataclasses.replace(items, bad=(BadRow(7, "torn", ""),))
    raw = validate(SourceTables(rows(), torn), COLUMNS, ANY)
    assert raw.notes[-1] == "items.csv: 1 rows repeat an id; the first row counts"


def test_titles_may_be_in_the_rows_and_the_first_counts() -> None:
    texts = rows(title=["Birch", "Ash", "Alder"])
    raw = validate(SourceTables(texts), COLUMNS, max_bad_rows=0)
    assert raw.catalogue.item_ids == ("b", "a")
    assert raw.catalogue.fields == {"title": ("Birch", "Ash")}
    assert raw.notes == ("1 rows give an item another title than its first row",)


def test_an_item_whose_rows_never_give_a_title_has_no_text() -> None:
    texts = rows(item_id=["b", "a", "b"], title=["", "Ash", "Birch"])
    raw = validate(SourceTables(texts), COLUMNS, max_bad_rows=0)
    assert raw.items.tolist() == [1, 0, 1]  # the first row of b is saved by the third
    texts = rows(title=["", "Ash", "Ash"])
    raw = validate(SourceTables(texts), COLUMNS, ANY)
    assert raw.examples == (f"rows.csv line 2: {NO_TEXT}: 'b'",)


def test_texts_are_brought_to_one_line() -> None:
    items = table("items.csv", item_id=["a", "b"], title=["A\n  sh", "B"], note=["x\ty", ""])
    raw = validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0)
    assert raw.catalogue.fields == {"title": ("A sh", "B"), "note": ("x y", "")}


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Ratchet &amp; Clank", "Ratchet & Clank"),
        ("PlayStation&reg; 2&nbsp;pad", "PlayStation® 2 pad"),
        ("Assassin&#39;s Creed &#x27;07", "Assassin's Creed '07"),
        ("Me&my, Q&A; &copy 2, AT&T &amp", "Me&my, Q&A; &copy 2, AT&T &amp"),
    ],
)
def test_names_of_characters_become_the_characters(title: str, expected: str) -> None:
    items = table("items.csv", item_id=["a", "b"], title=["Ash", title])
    raw = validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0)
    assert raw.catalogue.fields["title"][1] == expected


def test_a_text_without_end_is_cut_and_said_to_be() -> None:
    items = table("items.csv", item_id=["a", "b"], title=["Ash", "x " * 500_000])
    raw = validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0)
    assert len(raw.catalogue.fields["title"][1]) == 4096
    assert "1 texts of items are cut after 4,096 characters" in raw.notes


def test_a_mapped_title_wins_over_a_column_called_title() -> None:
    items = table("items.csv", item_id=["a", "b"], title=["Dr", "Mr"], name=["Ash", "Birch"])
    columns = ColumnsConfig(title="name")
    raw = validate(SourceTables(rows(), items), columns, max_bad_rows=0)
    assert raw.catalogue.fields == {"title": ("Ash", "Birch")}


def test_dates_are_times_and_without_a_zone_they_are_utc() -> None:
    dates = rows(
        timestamp=["1970-01-02", "1970-01-01 00:00:10.5", "1970-01-01T01:00:00+01:00"],
    )
    raw = validate(SourceTables(dates, ITEMS), COLUMNS, max_bad_rows=0)
    assert raw.timestamps is not None
    assert raw.timestamps.tolist() == [86400, 10.5, 0]


def test_whole_numbers_stay_whole_beside_a_bad_row() -> None:
    large = rows(timestamp=[str(2**62 + 1), "x", "7.0"])
    raw = validate(SourceTables(large, ITEMS), COLUMNS, ANY)
    assert raw.timestamps is not None
    assert raw.timestamps.dtype == np.int64
    assert raw.timestamps.tolist() == [2**62 + 1, 7]


def test_user_fields_are_by_user_and_empty_ids_are_left_out() -> None:
    users = table("users.csv", user_id=["v", ""], age=["31", "9"])
    raw = validate(SourceTables(rows(), ITEMS, users), COLUMNS, ANY)
    assert raw.user_fields["age"]["v"] == "31"
    assert raw.notes == (
        "users.csv: bad rows left out: 1 empty user id; users.csv line 3: empty user id",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "who"}, r"rows\.csv has no column 'who' \(data\.columns\.user\)"),
        ({"item": "what"}, r"rows\.csv has no column 'what' \(data\.columns\.item\)"),
        ({"title": "name"}, r"items\.csv has no column 'name' \(data\.columns\.title\)"),
        (
            {"timestamp": "time"},
            r"data\.columns\.timestamp\): set it to timestamp, if that is it; set it to null",
        ),
        ({"rating": "stars"}, r"data\.columns\.rating\): set it to rating, if that is it"),
    ],
)
def test_a_missing_column_names_its_config_key(changes: dict[str, str], message: str) -> None:
    columns = COLUMNS.model_copy(update=changes)
    with pytest.raises(DataError, match=message):
        validate(SourceTables(rows(), ITEMS), columns, ANY)


def test_without_titles_the_message_points_to_the_items_file() -> None:
    with pytest.raises(DataError, match=r"or name a file of item texts in data\.items"):
        validate(SourceTables(rows()), COLUMNS, ANY)


def test_tables_without_rows_pass() -> None:
    empty = table("rows.csv", user_id=[], item_id=[], timestamp=[], rating=[])
    raw = validate(SourceTables(empty, ITEMS), COLUMNS, max_bad_rows=0)
    assert len(raw.users) == len(raw.items) == 0


def test_texts_that_are_no_text_are_named_once_unless_they_have_a_role() -> None:
    columns = LazyColumns(
        ["title"], lambda name: ["Ash", "Birch"] if name == "title" else ["a", "b"]
    )
    items = Table("items", ("item_id", "title", "images"), columns, range(1, 3), unit="row")
    raw = validate(SourceTables(rows(), items), COLUMNS, max_bad_rows=0)
    assert raw.catalogue.fields == {"title": ("Ash", "Birch")}
    assert raw.notes == ("items: columns that are no text: images",)


CHOICES: list[tuple[list[str] | None, list[str]]] = [
    (None, ["title", "maker", "colour"]),
    ([], ["title"]),
    (["colour"], ["title", "colour"]),
    (["colour", "title", "maker", "colour"], ["title", "colour", "maker"]),
]


@pytest.mark.parametrize(("asked", "fields"), CHOICES)
def test_the_texts_of_an_item_are_those_that_were_asked_for(
    asked: list[str] | None, fields: list[str]
) -> None:
    items = Table(
        "items",
        ("item_id", "title", "maker", "colour"),
        {"item_id": ["a", "b"], "title": ["A", "B"], "maker": ["M", "N"], "colour": ["red", ""]},
        [2, 3],
    )
    columns = ColumnsConfig.model_validate({"text": asked})
    catalogue = validate(SourceTables(rows(), items), columns, ANY).catalogue
    assert list(catalogue.fields) == fields
    unknown = ColumnsConfig(text=("maker", "brand", "item_id"))
    with pytest.raises(
        DataError,
        match=r"data\.columns\.text: items has no text column 'brand', 'item_id'; "
        "beside the title there are: maker, colour",
    ):
        validate(SourceTables(rows(), items), unknown, ANY)


def test_texts_in_the_rows_are_read_where_they_are_asked_for() -> None:
    table = Table(
        "rows",
        ("user_id", "item_id", "timestamp", "title", "maker"),
        {
            "user_id": ["u", "v", "v"],
            "item_id": ["a", "a", "b"],
            "timestamp": ["1", "2", "3"],
            "title": ["A", "A", "B"],
            "maker": ["", "M", ""],
        },
        [2, 3, 4],
    )
    plain = validate(SourceTables(table), ColumnsConfig(), 0).catalogue
    assert plain.fields == {"title": ("A", "B")}
    asked = validate(SourceTables(table), ColumnsConfig(text=("maker",)), 0).catalogue
    assert asked.fields == {"title": ("A", "B"), "maker": ("M", "")}  # the first that is there
    with pytest.raises(DataError, match=r"no text column 'user_id'; .* there are: maker"):
        validate(SourceTables(table), ColumnsConfig(text=("user_id",)), 0)
