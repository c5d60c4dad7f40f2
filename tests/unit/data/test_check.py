"""A look at a source says what training would meet, and what would stop it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.data import ColumnsConfig, DataConfig
from pfm_llm.data.check import check_data, data_config

HEADER = "who,film,at,stars,title,city"


def write(path: Path, *rows: str) -> str:
    path.write_text("\n".join([HEADER, *rows, ""]))
    return str(path)


def film_rows(user: str, stars: list[int], start: int = 0) -> list[str]:
    """One row per rating, of items 0, 1, …, a second apart."""
    return [
        f"{user},{item},{start + item},{rating},Film {item},Bonn"
        for item, rating in enumerate(stars)
    ]


def config(source: str, *more: str) -> DataConfig:
    return data_config(source, columns=["user=who", "item=film", "timestamp=at", *more])


def test_columns_counts_lengths_and_times(tmp_path: Path) -> None:
    day = 86_400
    rows = [
        *film_rows("a", [5, 3, 4, 1], start=10_000 * day),
        *film_rows("b", [2] * 10, start=10_001 * day),
        *film_rows("c", [2]),  # too few, and the only ones of 1970
    ]
    checked = check_data(config(write(tmp_path / "own.csv", *rows)))
    assert checked.columns == {
        "user": "who",
        "item": "film",
        "timestamp": "at",
        "rating": "stars",
        "title": "title",
    }
    assert "rating = stars (recognised)" in checked.describe()
    assert checked.unused == ("city",)
    assert "\ntexts of an item: title\n" in checked.describe()
    assert checked.report.num_rows == 15
    assert (checked.report.num_users, checked.report.num_items) == (2, 10)
    assert sum(checked.report.dropped.values()) == 1
    # Lengths 4 and 10: numpy's nearest quantile of the two is the lower one up to a half.
    assert "events of a user: 4 to 10, median 4; 80 % of users have 4 to 10" in checked.describe()
    assert "time: 1997-05-19 to 1997-05-20" in checked.describe()
    assert checked.problems == ()


def test_an_order_is_not_shown_as_dates(tmp_path: Path) -> None:
    text = check_data(config(write(tmp_path / "own.csv", *film_rows("a", [1] * 5)))).describe()
    assert "time: 0 to 4, taken as an order" in text


def test_without_timestamps_the_order_of_the_file_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "own.csv", *film_rows("a", [1] * 5))
    checked = check_data(config(source, "timestamp=null"))
    assert "the rows are taken in the order of the file" in checked.describe()


def test_ratings_say_who_has_both_classes(tmp_path: Path) -> None:
    rows = [*film_rows("a", [5, 3, 4]), *film_rows("b", [5, 5, 5]), *film_rows("c", [1, 2, 1])]
    checked = check_data(config(write(tmp_path / "own.csv", *rows), "rating=stars"))
    # Likes are 4 and above: 2 of a, 3 of b, 0 of c, of 9.
    assert (
        "ratings: 1 to 5; 56% are likes, which are 4 and above (data.like_threshold); "
        "1 of 3 users have likes and other ratings\n"
    ) in checked.describe()


def test_ratings_that_nobody_has_both_classes_of(tmp_path: Path) -> None:
    rows = [*film_rows("b", [5, 5, 5]), *film_rows("c", [1, 2, 1])]
    checked = check_data(config(write(tmp_path / "own.csv", *rows), "rating=stars"))
    assert (
        "0 of 2 users have likes and other ratings, so that the task like cannot be measured"
        in (checked.describe())
    )


def test_titles_that_come_twice(tmp_path: Path) -> None:
    rows = [f"a,{item},{item},1,{title},x" for item, title in enumerate("xyxzx")]
    checked = check_data(config(write(tmp_path / "own.csv", *rows)))
    # Titles x, y, x, z, x: two items have the title of an earlier one.
    assert "titles: 2 items have the title of an earlier item, such as 'x'\n" in checked.describe()


def test_too_many_bad_rows_are_a_problem_and_the_rest_is_shown(tmp_path: Path) -> None:
    rows = [*film_rows("a", [1] * 5), "a,7,soon,1,Film 7,x"]
    checked = check_data(config(write(tmp_path / "own.csv", *rows)))
    (problem,) = checked.problems
    assert "1 of 6 rows cannot be used, more than data.max_bad_rows: 0.01" in problem
    assert "own.csv line 7" in problem
    assert checked.report.num_interactions == 5
    assert f"problem: {problem}" in checked.describe()


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        check_data(config(write(tmp_path / "own.csv", "a,7,soon,1,Film 7,x")))


def test_nobody_to_ask_is_a_problem(tmp_path: Path) -> None:
    rows = [*film_rows("a", [1] * 5), *film_rows("b", [1] * 4)]
    asked = config(write(tmp_path / "own.csv", *rows))
    checked = check_data(asked.model_copy(update={"keep_ties": True}))
    assert checked.problems == ()
    same_time = write(tmp_path / "same.csv", *(f"a,{n},7,1,Film {n},x" for n in range(5)))
    checked = check_data(config(same_time).model_copy(update={"keep_ties": True}))
    (problem,) = checked.problems
    assert "no user has a query at validation" in problem
    assert checked.split is None


def test_nobody_to_train_on_is_a_problem(tmp_path: Path) -> None:
    """Of three events two are held out, and one is no transition."""
    source = write(tmp_path / "own.csv", *film_rows("a", [1] * 3), *film_rows("b", [2] * 3))
    (problem,) = check_data(config(source)).problems
    assert problem.startswith("no user has two events to train on; give longer histories")


def test_what_was_inferred_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    rows = [f"u;{n};{1_500_000_000_000 + n};Film {n}" for n in range(5)]
    path.write_text("\n".join(["userId;movieId;ts;name", *rows]), encoding="utf-16")
    text = check_data(data_config(str(path))).describe()
    assert "separator ';'" in text
    assert "header in line 1, encoding UTF-16" in text
    assert "user = userId (recognised), item = movieId (recognised)" in text
    assert "rating = none" in text
    assert "time: 2017-07-14 to 2017-07-14, from milliseconds since 1970" in text
    block = yaml.safe_load(text.partition("The block for a config:")[2])
    assert block["data"]["columns"] == {
        "user": "userId", "item": "movieId", "timestamp": "ts", "title": "name",
    }  # fmt: skip


def test_the_block_reads_back_to_what_was_checked(tmp_path: Path) -> None:
    items = tmp_path / "it: ems.csv"
    items.write_text("film,title,maker\n" + "".join(f"{n},Film {n},M\n" for n in range(5)))
    source = write(tmp_path / "own.csv", *film_rows("a", [1] * 5))
    asked = data_config(source, str(items), ["user=who", "item=film", "timestamp=null"])
    checked = check_data(asked)
    assert "\ntexts of an item: title, maker\n" in checked.describe()
    assert checked.describe().endswith(checked.block())
    columns = asked.columns.model_copy(update={"rating": "stars"})  # recognised
    told = DataConfig.model_validate(yaml.safe_load(checked.block())["data"])
    assert told == asked.model_copy(update={"columns": columns})


def test_a_source_with_columns_of_its_own_has_a_block_without_them(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f"{n},Film {n} (1999),Drama\n" for n in range(5))
    )
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"1,{n},{n + 0.5},{n}\n" for n in range(5))
    )
    checked = check_data(data_config(str(tmp_path)))
    assert checked.columns["rating"] == "rating"
    assert "\ntexts of an item: title, year, genres\n" in checked.describe()
    assert yaml.safe_load(checked.block()) == {"data": {"source": str(tmp_path)}}


def test_nothing_is_written_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    check_data(config(write(tmp_path / "own.csv", *film_rows("a", [1] * 5))))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("entry", ["user", "user=", "usr=x", "=x", ""])
def test_columns_in_another_form_are_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="write role=name, with one of the roles user, item"):
        data_config("x.csv", columns=[entry])


def test_null_is_no_column_where_there_may_be_none() -> None:
    asked = data_config("x.csv", columns=["timestamp=null", "title=null"]).columns
    assert asked == ColumnsConfig(timestamp=None, title="null")


def test_the_line_that_reads_a_file_otherwise_is_shown_and_taken(tmp_path: Path) -> None:
    source = tmp_path / "own.csv"
    # Each separator gives three columns; the names alone tell, and they may be wrong.
    source.write_text("userId;itemId;title,ts\n" + "".join(f"u;{n};A{n},{n}\n" for n in range(5)))
    with pytest.raises(DataError, match="some columns are missing"):
        check_data(data_config(str(source), columns=["user=u", "timestamp=null", "title=title,t"]))
    checked = check_data(
        data_config(
            str(source),
            columns=["timestamp=null", "title=column_3", "user=column_1", "item=column_2"],
            overrides=["data.reading={separator: ;, header: false}"],
        )
    )
    assert checked.interactions.catalogue.fields["title"][:2] == ("title,ts", "A0,0")
    line = "to read it otherwise, put this under data: and change it: reading: "
    [told] = [text for text in checked.describe().splitlines() if text.startswith(line)]
    reading = yaml.safe_load(told.removeprefix(line))
    assert reading == {"separator": ";", "encoding": "UTF-8", "header": False}
    assert yaml.safe_load(checked.block())["data"]["reading"]["header"] is False


def test_a_rating_that_nobody_wants_is_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "own.csv", *film_rows("a", [5, 3, 4, 1]))
    checked = check_data(config(source))
    assert checked.interactions.ratings is not None
    assert (
        "\nto read no ratings, put this under data: and change it: columns: {rating: null}\n"
        in (checked.describe())
    )
    off = check_data(config(source, "rating=null"))
    assert off.interactions.ratings is None
    assert "stars" in off.unused
    assert yaml.safe_load(off.block())["data"]["columns"]["rating"] is None


def test_a_rating_that_was_not_read_is_none_in_the_block(tmp_path: Path) -> None:
    """Named in the block, its gaps would be bad rows."""
    rows = [f"a,{n},{n},{'' if n % 2 else n},Film {n}" for n in range(5)]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["user,item,time,rating,title", *rows]))
    checked = check_data(data_config(str(path)))
    assert checked.interactions.ratings is None
    assert "rating = none" in checked.describe()
    assert "to read no ratings" not in checked.describe()
    assert checked.unused == ("rating",)
    assert yaml.safe_load(checked.block())["data"]["columns"]["rating"] is None
    (tmp_path / "own.yaml").write_text(f"name: own\n{checked.block()}\n")
    again = check_data(data_config(str(tmp_path / "own.yaml")))
    assert (again.problems, again.report.dropped) == ((), {})
    # Someone who names the column has its gaps counted.
    named = check_data(data_config(str(path), columns=["rating=rating"]))
    assert sum(named.report.dropped.values()) == 2


def test_a_config_is_checked_by_its_section(tmp_path: Path) -> None:
    write(tmp_path / "own.csv", *film_rows("a", [5, 3, 4, 1]))
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndata:\n  source: own.csv\n  columns: {user: who, item: film, timestamp: at}\n"
    )
    asked = data_config(str(path), columns=["rating=null"], overrides=["data.split=last_fraction"])
    assert (asked.source, asked.split) == (str(tmp_path / "own.csv"), "last_fraction")
    assert asked.columns == ColumnsConfig(user="who", item="film", timestamp="at", rating=None)
    with pytest.raises(ConfigError, match=r"data\.reading\.separator: .* give the characters"):
        data_config(str(path), overrides=["data.reading.separator='\"'"])
    with pytest.raises(ConfigError, match="put a text in quotation marks"):
        data_config(str(path), overrides=["data.reading.separator=,"])
    with pytest.raises(ConfigError, match=r"'utf-88' is no encoding of text"):
        data_config(str(path), overrides=["data.reading.encoding=utf-88"])


def test_dates_say_whether_the_day_or_the_month_is_first(tmp_path: Path) -> None:
    rows = [f"a,{n},{n + 9}/02/2020,3,Film {n},Bonn" for n in range(5)]  # 9 to 13
    checked = check_data(config(write(tmp_path / "own.csv", *rows)))
    assert (
        "time: 2020-02-09 to 2020-02-13, from dates with the day first; data.day_first: false"
        in (checked.describe())
    )
    source = write(tmp_path / "own.csv", *rows[:4])
    with pytest.raises(DataError, match=r"own\.csv line 2: '9/02/2020' may begin with"):
        check_data(config(source))
    asked = data_config(source, columns=["user=who", "item=film", "timestamp=at"],
                        overrides=["data.day_first=false"])  # fmt: skip
    checked = check_data(asked)
    assert "time: 2020-09-02 to 2020-12-02" in checked.describe()
    assert yaml.safe_load(checked.block())["data"]["day_first"] is False


def test_the_texts_of_an_item_can_be_chosen(tmp_path: Path) -> None:
    source = write(tmp_path / "own.csv", *film_rows("a", [1] * 5))
    checked = check_data(config(source))
    line = "to choose other texts, put this under data: and change it: columns: {text: [city]}"
    assert line in checked.describe().splitlines()
    asked = data_config(
        source,
        columns=["user=who", "item=film", "timestamp=at"],
        overrides=["data.columns.text=[city]"],
    )
    checked = check_data(asked)
    assert checked.interactions.catalogue.fields["city"] == ("Bonn",) * 5
    assert checked.unused == ()
    assert yaml.safe_load(checked.block())["data"]["columns"]["text"] == ["city"]


def test_the_texts_of_a_format_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(
        "movieId,title,genres\n" + "".join(f"{n},Film {n} (1999),Drama\n" for n in range(5))
    )
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"1,{n},{n + 0.5},{n}\n" for n in range(5))
    )
    checked = check_data(data_config(str(tmp_path), overrides=["data.columns.text=[year]"]))
    assert list(checked.interactions.catalogue.fields) == ["title", "year"]
    assert yaml.safe_load(checked.block())["data"]["columns"] == {"text": ["year"]}


def arrow(path: Path, **columns: pa.Array) -> str:
    """Rows of one user; the columns replace the usual ones, or stand beside them."""
    usual = {
        "user_id": pa.array([1] * 4), "item_id": pa.array(range(4)),
        "timestamp": pa.array(range(4)), "title": pa.array(list("ABCD")),
    }  # fmt: skip
    pq.write_table(pa.table({**usual, **columns}), path)
    return str(path)


def test_a_column_that_is_no_text_is_recognised_only_where_it_must_be(tmp_path: Path) -> None:
    structs, path = pa.array([{"value": 1}] * 4), tmp_path / "rows.parquet"
    checked = check_data(data_config(arrow(path, rating=structs)))  # nobody asked for ratings
    assert (checked.columns["rating"], checked.unused) == (None, ("rating",))
    checked = check_data(data_config(arrow(path, rating=structs, stars=pa.array([1, 2, 3, 4]))))
    assert checked.columns["rating"] == "stars"
    checked = check_data(data_config(arrow(path, title=structs, name=pa.array(list("EFGH")))))
    assert checked.columns["title"] == "name"
    checked = check_data(data_config(arrow(path, user_id=pa.array([b"\xff"] * 4))))
    assert checked.interactions.user_ids == ("ff",)
    for column in ("title", "user_id", "timestamp"):
        with pytest.raises(DataError, match=f"'{column}' of type struct.* name another column"):
            check_data(data_config(arrow(path, **{column: structs})))
    with pytest.raises(DataError, match="'rating' of type struct"):
        check_data(data_config(arrow(path, rating=structs), columns=["rating=rating"]))


def test_numbers_of_half_precision_are_ratings(tmp_path: Path) -> None:
    halves = pa.array([1, 2.5, 3, 4], pa.float32()).cast(pa.float16())
    checked = check_data(data_config(arrow(tmp_path / "rows.parquet", stars=halves)))
    assert checked.interactions.ratings is not None
    assert checked.interactions.ratings.tolist() == [1, 2.5, 3, 4]


def test_a_column_that_comes_twice_in_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["user_id", "user_id"]), path)
    with pytest.raises(DataError, match="column 'user_id' comes twice"):
        check_data(data_config(str(path)))


def test_a_file_of_one_column_says_how_to_name_its_separator(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("user item\n1 2\n")
    with pytest.raises(DataError, match=r"read as one column; .* data\.reading\.separator"):
        check_data(data_config(str(tmp_path / "own.txt")))
