"""A folder of parts is one table, and a folder of several tables is named as what it is."""

import gzip
from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ReadingConfig
from pfm_llm.data.formats.files import files_of, read_table

ROWS = ["u;1;9", "u;2;8", "v;1;7"]
HEADER = "user;item;ts"


def write(folder: Path, **parts: str) -> Path:
    for name, content in parts.items():
        stem, _, suffix = name.partition("_")
        (folder / f"{stem}.{suffix}").write_text(content)
    return folder


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize("again", [True, False], ids=["each has a header", "the first has one"])
def test_parts_of_separated_fields(again: bool, tmp_path: Path) -> None:
    second = [HEADER, *ROWS[1:]] if again else ROWS[1:]
    write(tmp_path, b_csv=lines(*second), a_csv=lines(HEADER, ROWS[0], "torn"), c_csv="")
    write(tmp_path, _crc_csv="hidden", notes_txt="no table")
    table = read_table(tmp_path)
    assert dict(table.columns) == {
        "user": ["u", "u", "v"], "item": ["1", "2", "1"], "ts": ["9", "8", "7"],
    }  # fmt: skip
    assert table.num_rows == 4
    # Line 2 of a.csv, and the lines of b.csv after its header.
    assert [table.place(at) for at in table.positions] == [
        f"{tmp_path / 'a.csv'} line 2",
        *(f"{tmp_path / 'b.csv'} line {line + again}" for line in (1, 2)),
    ]
    [bad] = table.bad
    assert table.place(bad.position) == f"{tmp_path / 'a.csv'} line 3"
    assert len({*table.positions, bad.position}) == 4
    assert [file.name for file in files_of(tmp_path)] == ["a.csv", "b.csv"]


def test_parts_without_any_header(tmp_path: Path) -> None:
    times = [str(1_500_000_000 + n) for n in range(4)]
    # The second part alone has a column of few small numbers, which looks like ratings.
    write(
        tmp_path,
        a_csv=lines(f"u,1,0.123,{times[0]}", f"u,2,999,{times[1]}"),
        b_csv=lines(f"v,1,4,{times[2]}", f"v,2,5,{times[3]}"),
    )
    table = read_table(tmp_path)
    assert table.header == ("user_id", "item_id", "column_3", "timestamp")
    assert table.columns["column_3"] == ["0.123", "999", "4", "5"]
    assert len([note for note in table.notes if "no header" in note]) == 1
    asked = ReadingConfig(header=False)
    assert dict(read_table(tmp_path, (), asked).columns) == dict(table.columns)


def test_parts_of_json_may_lack_keys_and_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"u": 1, "i": 2, "x": {"deep": 1}}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"u": 3, "i": 4, "n": "A"}\n'))
    table = read_table(tmp_path)
    assert dict(table.columns) == {"u": ["1", "3"], "i": ["2", "4"], "n": ["", "A"]}
    assert table.passed_over == ["x"]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a_csv": "user,item\n", "b_jsonl": '{"a": 1}\n'},
         r"several kinds \(CSV, JSON\).*: a\.csv, b\.jsonl; "),
        ({"events_csv": "user,item\nu,1\n", "items_csv": "item,title\n1,A\n"},
         r"events\.csv has user, item, and .*items\.csv has item, title.*; name one"),
        ({"a_csv": "user,item\nu,1\n", "b_csv": "u,1,2\n"},
         r"b\.csv has .*The files: a\.csv, b\.csv"),
        ({"meta_jsonl": '{"asin": 1, "title": 2, "price": 3, "brand": 4}\n',
          "reviews_jsonl": '{"asin": 1, "user": 2, "stars": 3, "text": 4}\n'}, "other columns"),
    ],
)  # fmt: skip
def test_a_folder_of_several_tables_lists_them(
    files: dict[str, str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=problem):
        read_table(write(tmp_path, **files))
