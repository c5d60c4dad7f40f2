"""The column of each role: named, recognised, or all that is missing in one message."""

import pytest
import yaml

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig, DataConfig
from pfm_llm.data.columns import USUAL, resolve
from pfm_llm.data.rows import validate
from pfm_llm.data.tables import SourceTables, Table


def table(name: str, header: str, *rows: str) -> Table:
    names = header.split(",")
    cells = [row.split(",") for row in rows]
    columns = {column: [row[at] for row in cells] for at, column in enumerate(names)}
    return Table(name, tuple(names), columns, range(2, len(rows) + 2))


def refusal(tables: SourceTables, **asked: str | None) -> tuple[list[str], dict[str, str | None]]:
    """The lines of the error, and the columns of its block."""
    with pytest.raises(DataError) as caught:
        resolve(tables, ColumnsConfig.model_validate(asked))
    told, block = str(caught.value).split("A block for the config; check it before use:\n")
    return told.splitlines(), yaml.safe_load(block)["data"]["columns"]


@pytest.mark.parametrize(
    ("rows", "items", "expected"),
    [
        ("userId,movieId,rating,timestamp", "movieId,title,genres",
         ("userId", "movieId", "timestamp", "rating", "title", "movieId")),
        ("reviewerID,asin,overall,unixReviewTime,reviewTime,summary", "asin,title,brand",
         ("reviewerID", "asin", "unixReviewTime", "overall", "title", "asin")),
        ("user_id,asin,parent_asin,rating,timestamp", "parent_asin,title",
         ("user_id", "parent_asin", "timestamp", "rating", "title", "parent_asin")),
        ("USER ID,Item-Id,ts,stars", "itemId,name", ("USER ID", "Item-Id", "ts", "stars", "name",
         "itemId")),
        ("uid,book_id,date,score", "id,movie_title", ("uid", "book_id", "date", "score",
         "movie_title", "id")),
        ("user,item,time", "sku,title", ("user", "item", "time", None, "title", "sku")),
    ],
)  # fmt: skip
def test_usual_names_are_recognised(
    rows: str, items: str, expected: tuple[str | None, ...]
) -> None:
    roles = resolve(SourceTables(table("r", rows), table("i", items)), ColumnsConfig())
    found = (roles.user, roles.item, roles.timestamp, roles.rating, roles.title, roles.items_item)
    assert found == expected


def test_the_first_of_several_usual_names_counts_and_the_default_before_it() -> None:
    rows = table("r", "userId,user_id,movieId,item_id,time,timestamp,name,title")
    roles = resolve(SourceTables(rows), ColumnsConfig())
    assert roles.as_config() == ColumnsConfig(rating=None)


def test_a_name_of_the_config_wins_and_has_no_second_role() -> None:
    rows = table("r", "user_id,uid,item_id,title,timestamp,time,name,rating")
    asked = ColumnsConfig(user="uid", title="name", timestamp="time", rating="timestamp")
    roles = resolve(SourceTables(rows), asked)
    assert (roles.user, roles.title, roles.timestamp) == ("uid", "name", "time")
    assert roles.rating == "timestamp"
    assert resolve(SourceTables(rows), ColumnsConfig(timestamp=None)).timestamp is None


def test_items_may_name_their_id_otherwise() -> None:
    tables = SourceTables(table("r", "user_id,film,time"), table("i", "key,film,title"))
    assert resolve(tables, ColumnsConfig(item="film")).items_item == "film"
    assert resolve(tables, ColumnsConfig(item="film", items_item="key")).items_item == "key"
    _, block = refusal(tables, item="film", items_item="kee")
    assert block["items_item"] == "key"


def test_everything_that_is_missing_is_said_at_once() -> None:
    tables = SourceTables(table("r.csv", "who,what,when", "7,8,9"), table("i.csv", "code,words"))
    told, block = refusal(tables)
    for role in ("user", "item", "timestamp", "title", "items_item"):
        assert any(f"(data.columns.{role}):" in line for line in told)
    assert "  the columns of r.csv: who, what, when" in told
    assert "  the columns of i.csv: code, words" in told
    assert any("first line of the file is no header" in line for line in told)
    assert DataConfig.model_validate({"columns": block})


@pytest.mark.parametrize(
    ("rows", "items", "asked"),
    [
        ("user_id,item_id,timestamp", None, {}),
        ("movieId,title,timestamp", None, {}),
        ("user,title", None, {}),
        ("user_idd,itemm,timestampp,titlee", None, {}),
        ("a,b", "c", {}),
        ("a", "b,c,d", {"user": "x"}),
        ("user_id,item_id,timestamp,title", None, {"user": "item"}),
        ('"user_id",yes,no,null', None, {}),
    ],
)
def test_advice_never_gives_a_column_two_roles(
    rows: str, items: str | None, asked: dict[str, str]
) -> None:
    tables = SourceTables(table("r", rows), None if items is None else table("i", items))
    _, block = refusal(tables, **asked)
    of_rows = [name for role, name in block.items() if role not in ("title", "items_item") and name]
    of_items = [name for role, name in block.items() if role in ("title", "items_item")]
    header = rows.split(",")
    if items is None:
        of_rows, of_items = of_rows + of_items, []
    assert len(set(of_rows)) == len(of_rows)
    assert len(set(of_items)) == len(of_items)
    assert set(of_rows) <= set(header)
    assert ColumnsConfig.model_validate(block)


def test_interactions_without_titles_are_not_told_to_take_their_ids() -> None:
    told, block = refusal(SourceTables(table("r", "user_id,item_id,timestamp")))
    assert "name a file of item texts in data.items" in told[1]
    assert "title" not in block


def test_dates_are_proposed_as_times() -> None:
    rows = table("r", "klant,artikel,moment,naam", "7,8,2020-01-01,Melk")
    _, block = refusal(SourceTables(rows), title="naam")
    assert block == {"user": "klant", "item": "artikel", "timestamp": "moment", "title": "naam"}


def test_a_recognised_rating_that_is_no_number_is_not_read_as_one() -> None:
    rows = table(
        "r", "user_id,item_id,timestamp,title,rating", "u,1,1,A,5", "u,2,2,B,", "u,3,3,C,good"
    )
    raw = validate(SourceTables(rows), ColumnsConfig(), max_bad_rows=0)
    assert (raw.ratings, raw.num_bad) == (None, {})
    assert raw.notes == (
        "r line 3: no number, so that column 'rating' is not read as ratings; "
        "data.columns.rating: rating counts such rows as bad",
    )
    with pytest.raises(DataError, match="2 of 3 rows"):
        validate(SourceTables(rows), ColumnsConfig(rating="rating"), max_bad_rows=0)


def test_no_usual_name_means_two_things() -> None:
    """But for ids, which have one name in both tables."""
    apart = [set(USUAL[role]) for role in ("user", "item", "timestamp", "rating", "title")]
    assert len(set.union(*apart)) == sum(map(len, apart))
