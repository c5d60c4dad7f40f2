"""Reading tables: every row knows its line, and what cannot be read is named."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.data.tables import CSV, TSV, Layout, from_arrow_table, read_delimited, read_table


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


def test_latin1_is_read_where_the_layout_allows_it_and_else_the_line_is_named(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "t.dat", "id|title\n1|Ça\n".encode("latin-1"))
    assert read_delimited(path, Layout("|", latin1=True)).columns["title"] == ["Ça"]
    with pytest.raises(DataError, match=r"line 2: not UTF-8 .* save the file as UTF-8"):
        read_delimited(path, Layout("|"))


def test_only_wanted_columns_are_read_but_the_header_is_known(tmp_path: Path) -> None:
    csv = write(tmp_path / "t.csv", "a,b,c\n1,2,3\n")
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "t.parquet")
    for path in (csv, tmp_path / "t.parquet"):
        table = read_table(path, {"c", "a", "other"})
        assert table.columns == {"a": ["1"], "c": ["3"]}
        assert table.header == ("a", "b", "c")


def test_a_missing_column_names_itself_its_key_the_others_and_the_nearest(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.csv", "userId,film,when\n1,2,3\n"))
    with pytest.raises(DataError) as caught:
        table.column("user_id", "data.columns.user")
    assert str(caught.value) == (
        f"{tmp_path}/t.csv has no column 'user_id' (data.columns.user); its columns: userId, "
        "film, when; set data.columns.user: userId (the nearest)"
    )
    with pytest.raises(DataError, match=r"set data\.columns\.rating to one of them, or null"):
        table.column("xyzzy", "data.columns.rating", "or null")
    with pytest.raises(DataError, match="is the file whole"):
        table.column("xyzzy")


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


def test_a_column_without_a_form_as_text_is_named() -> None:
    content = pa.table({"nested": pa.array([{"a": 1}])})
    with pytest.raises(DataError, match="here: column 'nested' of type struct"):
        from_arrow_table("here", content, ("nested",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty; its first line must name the columns"),
        ("t.tsv", "\n\n", "is empty"),
        ("t.csv", "a,b,a\n", "column 'a' comes twice"),
        ("t.parquet", "no parquet", "not a readable Parquet file"),
        ("t.xlsx", "", "unknown kind of file '.xlsx'; a table is one of .csv, .tsv, .parquet"),
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
