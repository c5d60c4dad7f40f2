"""Reading tables: every row knows its line, and what cannot be read is named."""

import datetime
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ReadingConfig
from pfm_llm.data.formats.arrow_table import from_arrow
from pfm_llm.data.formats.delimited import CSV, TSV, Layout, read_delimited
from pfm_llm.data.formats.files import read_table


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_quoted_line_breaks_and_blank_lines_keep_later_line_numbers_right(tmp_path: Path) -> None:
    text = 'id,title\n1,"two\nlines, ""quoted"""\n\n2,x\n3\n4,y\n'
    table = read_table(write(tmp_path / "t.csv", text))
    # Line 1 header, 2-3 the first row, 4 blank, 5 "2,x", 6 too short, 7 "4,y".
    assert table.columns == {"id": ["1", "2", "4"], "title": ['two\nlines, "quoted"', "x", "y"]}
    assert list(table.positions) == [2, 5, 7]
    [bad] = table.bad
    assert bad == (6, "wrong number of fields", "1 fields, expected 2")
    assert table.num_rows == 4


def test_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path: Path) -> None:
    for name in ("t.csv", "t.tsv"):
        separator = "," if name.endswith("csv") else "\t"
        text = "id,title\r\n1, é \r\n".replace(",", separator)
        table = read_table(write(tmp_path / name, text.encode("utf-8-sig")))
        assert table.columns == {"id": ["1"], "title": ["é"]}


def test_a_malformed_quote_costs_its_row_alone(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", 'id,title\n1,"a"b\n2,"c"\n'))
    assert table.columns["id"] == ["2"]
    assert [(bad.position, bad.reason) for bad in table.bad] == [(2, "malformed quotes")]


def test_a_quote_that_is_never_closed_stops_and_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'id,title\n1,a\n2,"b\n3,c\n')
    with pytest.raises(DataError, match=r"t\.csv line 3: a quotation mark that is never closed"):
        read_table(path)


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.TSV", 'id\ttitle\n1\t"Weird Al" Live\n2\t"open\n')
    assert read_table(path).columns["title"] == ['"Weird Al" Live', '"open']


def test_a_separator_may_have_several_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "t.dat", "1::a:b::3\n2::c\n")
    table = read_delimited(path, Layout("::", ("id", "title", "n")))
    assert table.columns == {"id": ["1"], "title": ["a:b"], "n": ["3"]}
    assert list(table.positions) == [1]
    assert table.bad[0].position == 2


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("latin-1", "Latin-1"), ("cp1252", "Windows-1252"), ("utf-16", "UTF-16"),
     ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-8-sig", "UTF-8")],
)  # fmt: skip
def test_the_encoding_is_told_by_the_bytes(encoding: str, name: str, tmp_path: Path) -> None:
    title = "Ça – là" if encoding != "latin-1" else "Ça là"
    path = write(tmp_path / "t.csv", f"item_id,title\n1,{title}\n2,x\n".encode(encoding))
    table = read_table(path)
    assert table.columns["title"] == [title, "x"]
    assert f"encoding {name}" in table.inferred
    assert bool(table.notes) == (not name.startswith("UTF"))


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    content = "id|title\n1|Ça là é\n".encode() + b"2|Caf\xc3\n"
    with pytest.raises(DataError, match=r"line 3: not UTF-8 .* save the file as UTF-8"):
        read_table(write(tmp_path / "t.dat", content))


def test_a_gzipped_file_is_unpacked_and_a_damaged_one_named(tmp_path: Path) -> None:
    content = gzip.compress(b"item_id;title\n1;a, b\n")
    assert read_table(write(tmp_path / "t.csv.gz", content)).columns["title"] == ["a, b"]
    with pytest.raises(DataError, match=r"t\.csv\.gz cannot be read .*; get the file again"):
        read_table(write(tmp_path / "t.csv.gz", content[:-9]))


def test_columns_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_text("gone")
    assert table.header == ("a", "b")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        table.column("a")
    with pytest.raises(DataError, match="has no column 'c'; its columns: a, b; is the file whole"):
        table.column("c")


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        (['"user_id"\t"item_id"', '"u1"\t"1"'], {"user_id": ["u1"], "item_id": ["1"]}),
        (['item_id\ttitle', '"1"\t"red fish"'], {"item_id": ["1"], "title": ["red fish"]}),
        (['item_id\ttitle', '1\t"red ""big"" fish"', "2\tx"],
         {"item_id": ["1", "2"], "title": ['red "big" fish', "x"]}),
        (['item_id\ttitle', '1\t"red\tfish"', "2\tx"],
         {"item_id": ["1", "2"], "title": ["red\tfish", "x"]}),
        (['"item_id"\t"title"', '1\t"red \\"big\\" fish"'],
         {"item_id": ["1"], "title": ['red "big" fish']}),
        (["item_id\ttitle", '1\t"two\nlines"', "2\tx"],
         {"item_id": ["1", "2"], "title": ["two\nlines", "x"]}),
        (['"item_id"\t"title"', '"1"\t"a"', '"torn"', '"2"\t"a"b"', '"3"\t"c"'],
         {"item_id": ["1", "3"], "title": ["a", "c"]}),
        (["item_id\ttitle", '1\t"Weird Al" Live', "torn", "2\tLow", '3\t"open'],
         {"item_id": ["1", "2", "3"], "title": ['"Weird Al" Live', "Low", '"open']}),
        (['item_id\ttitle', '1\t"Heroes"', "2\tLow"],
         {"item_id": ["1", "2"], "title": ['"Heroes"', "Low"]}),
    ],
)  # fmt: skip
def test_quotation_marks_of_a_tsv_enclose_fields_where_the_lines_show_it(
    lines: list[str], columns: dict[str, list[str]], tmp_path: Path
) -> None:
    assert read_table(write(tmp_path / "t.tsv", "\n".join(lines))).columns == columns


def test_a_header_is_told_from_a_first_row(tmp_path: Path) -> None:
    rows = "7::12::4.5::881250949\n7::13::3::881250950\n"
    table = read_table(write(tmp_path / "ratings.dat", rows))
    assert table.header == ("user_id", "item_id", "rating", "timestamp")
    assert "no header, columns named user_id, item_id, rating, timestamp" in table.inferred
    assert table.num_rows == 2
    named = read_table(write(tmp_path / "r.csv", "who,what,when\n7,12,3\n7,13,4\n"))
    assert named.header == ("who", "what", "when")
    digits = read_table(write(tmp_path / "d.csv", "0,1\n7,12\n7,13\n"), names={"0", "1"})
    assert digits.header == ("0", "1")
    items = read_table(write(tmp_path / "movies.dat", "1::Toy Story (1995)::A|B\n2::Heat::C|D\n"))
    assert items.header == ("item_id", "title", "column_3")
    amazon = read_table(write(tmp_path / "a.csv", "B000123456,A3AF8FFZAZYNE5,5.0,1230768000\n"))
    assert amazon.header == ("item_id", "user_id", "rating", "timestamp")


def test_parquet_values_become_text(tmp_path: Path) -> None:
    content = pa.table(
        {
            "whole": pa.array([1.0, None, float("nan")]),
            "part": pa.array([1.5, 2.0, None]),
            "big": pa.array([2**62 + 1, None, -1]),
            "text": pa.array([" a ", None, ""]),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "genres": pa.array([["a", "b"], [], None]),
            "when": pa.array([datetime.datetime(2020, 1, 2, 3, 4, 5, 250_000), None, None]),
        }
    )
    pq.write_table(content, tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert table.columns["whole"] == ["1", "", ""]
    assert [float(value) for value in table.columns["part"][:2]] == [1.5, 2.0]
    assert table.columns["big"] == [str(2**62 + 1), "", "-1"]
    assert table.columns["text"] == ["a", "", ""]
    assert table.columns["kind"] == ["x", "y", "x"]
    assert table.columns["genres"] == ["a, b", "", ""]
    when = datetime.datetime.fromisoformat(table.columns["when"][0])
    assert when == datetime.datetime(2020, 1, 2, 3, 4, 5, 250_000)
    assert table.unit == "row"
    assert list(table.positions) == [1, 2, 3]


def test_columns_without_a_form_as_text_are_passed_over_until_they_are_asked_for() -> None:
    values = {
        "title": pa.array(["x"]),
        "nested": pa.array([{"a": 1}]),
        "images": pa.array([[{"url": "x"}]]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "bytes": pa.array([b"u1"]),
        "key": pa.array([b"\x00\xff"]),
    }
    table = from_arrow("here", pa.table(values))
    assert list(table.columns) == ["title"]
    assert table.header == tuple(values)
    assert table.passed_over == ["nested", "images", "map", "bytes", "key"]
    assert (table.column("bytes"), table.column("key")) == (["u1"], ["00ff"])
    with pytest.raises(DataError, match="here: column 'nested' of type struct"):
        table.column("nested")


def test_a_folder_of_parquet_parts_is_one_table(tmp_path: Path) -> None:
    for part in range(3):
        (tmp_path / f"day={part}").mkdir()
        pq.write_table(pa.table({"a": [part]}), tmp_path / f"day={part}" / "part-0.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    assert read_table(tmp_path).columns == {"a": ["0", "1", "2"]}


@pytest.mark.parametrize("array", [False, True])
def test_json_objects_become_rows(array: bool, tmp_path: Path) -> None:
    rows = ['{"asin": "1", "title": "a", "cats": ["x", "y"], "n": 5.0}',
            '{"asin": "2", "title": null, "details": {"k": 1}, "ok": true}']  # fmt: skip
    text = f"[{','.join(rows)}]" if array else "\n".join(rows)
    table = read_table(write(tmp_path / "t.jsonl.gz", gzip.compress(text.encode())))
    assert table.columns == {
        "asin": ["1", "2"], "title": ["a", ""], "cats": ["x, y", ""], "n": ["5.0", ""],
        "ok": ["", "true"],
    }  # fmt: skip
    assert table.passed_over == ["details"]
    with pytest.raises(DataError, match="'details' holds nested values"):
        table.column("details")


def test_metadata_of_2014_are_python_literals_and_broken_lines_are_bad(tmp_path: Path) -> None:
    text = "{'asin': '1', 'title': \"It's\", 'categories': [['Books', 'New']]}\n{broken\n[1]\n"
    table = read_table(write(tmp_path / "meta.json", text))
    assert table.columns == {"asin": ["1"], "title": ["It's"], "categories": ["Books, New"]}
    assert [bad.position for bad in table.bad] == [2, 3]


def test_the_title_of_a_review_is_not_that_of_the_item(tmp_path: Path) -> None:
    review = '{"rating": 5.0, "title": "Great!", "parent_asin": "B1", "user_id": "U"}'
    table = read_table(write(tmp_path / "r.jsonl", review))
    assert table.header == ("rating", "summary", "parent_asin", "user_id")
    assert table.column("summary") == ["Great!"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty; its first line must name the columns"),
        ("t.tsv", "\n\n", "is empty"),
        ("t.csv", "a,b,a\n", "column 'a' comes twice"),
        ("t.parquet", "no parquet", "not a readable Parquet file"),
        ("t.xlsx", "PK\x03\x04", "a ZIP archive or a spreadsheet; unpack it, or save .* as CSV"),
        ("t.bin", "ab\x00cd", "is no text file; a table is CSV, TSV, JSON or Parquet"),
        ("t.json", "{\n", "needs an object on each line"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name} does not exist"):
        read_table(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name} is a folder"):
        read_table(tmp_path / name)


def test_a_header_alone_is_a_table_without_rows(tmp_path: Path) -> None:
    for layout, text in ((CSV, "a,b"), (TSV, "a\tb\n")):
        table = read_delimited(write(tmp_path / "t", text), layout)
        assert table.columns == {"a": [], "b": []}
        assert table.num_rows == 0


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_three_ways(separator: str, end: str, tmp_path: Path) -> None:
    rows = (["item_id", "title"], ["a", "Ash"], ["b", "Birch"])
    text = "".join(separator.join(row) + end for row in rows)
    table = read_table(write(tmp_path / "t.txt", text))
    assert table.columns == {"item_id": ["a", "b"], "title": ["Ash", "Birch"]}


def test_a_very_long_field_costs_its_row_alone(tmp_path: Path) -> None:
    text = f"item_id,title\na,{'x' * 200_000}\nb,Birch\n"
    table = read_table(write(tmp_path / "t.csv", text))
    assert table.columns["item_id"] == ["b"]
    assert [bad.position for bad in table.bad] == [2]


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", ",item_id,title,,\n0,a,Ash,,\n1,b,Birch,,\n"))
    assert table.header == ("item_id", "title")
    assert table.columns == {"item_id": ["a", "b"], "title": ["Ash", "Birch"]}


@pytest.mark.parametrize(
    ("content", "reading", "header", "first"),
    [
        # The first line reads as a header by its word "name", and as a row by the setting.
        ("name;a\nb;c\n", {"header": False}, ("item_id", "title"), ["name", "a"]),
        ("7;8\n5;6\n", {"header": True}, ("7", "8"), ["5", "6"]),
        # Each line has as many commas as bars.
        ("id|x,name\n1|y,z\n", {"separator": "|"}, ("id", "x,name"), ["1", "y,z"]),
        ("id^name\n1^y\n", {"separator": "^"}, ("id", "name"), ["1", "y"]),
        ("id\tname\n1\ty\n", {"separator": "tab"}, ("id", "name"), ["1", "y"]),
        # The bytes are Windows-1252 or Cyrillic; nothing in them tells.
        ("id;name\n1;\xc4\n".encode("latin-1"), {"encoding": "cp1251"}, ("id", "name"), ["1", "Д"]),
        ('\ufeff["x"]::y\n1::2\n', {"separator": "::", "header": True, "encoding": "utf-8"},
         ('["x"]', "y"), ["1", "2"]),
    ],
)  # fmt: skip
def test_what_is_inferred_wrongly_can_be_set(
    content: str | bytes,
    reading: dict[str, object],
    header: tuple[str, ...],
    first: list[str],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "t.csv", content)
    table = read_table(path, (), ReadingConfig.model_validate(reading))
    assert table.header == header
    assert [table.columns[name][0] for name in header] == first
    # The layout is the block that reads the file in the same way.
    again = read_table(path, (), ReadingConfig.model_validate(table.layout))
    assert dict(again.columns) == dict(table.columns)


def test_the_line_in_which_a_spreadsheet_names_its_separator(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", "sep=;\r\nid;title\r\n1;A,B\r\n"))
    assert dict(table.columns) == {"id": ["1"], "title": ["A,B"]}
    assert list(table.positions) == [3]


@pytest.mark.parametrize(
    ("name", "content", "reading", "problem"),
    [
        ("t.csv", "id,name\n", {"separator": ";"}, r"separator ';' stands in none .* 'id,name'"),
        ("t.csv", "id,né\n", {"encoding": "ascii"}, r"encoding ascii .*data\.reading\.encoding"),
        ("t.json", '{"id": 1}\n', {"header": True}, r"is JSON, which header"),
    ],
)
def test_a_setting_that_does_not_fit_the_file_is_refused(
    name: str, content: str, reading: dict[str, object], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=problem):
        read_table(write(tmp_path / name, content), (), ReadingConfig.model_validate(reading))
