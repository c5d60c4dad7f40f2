"""The section ``data``: paths are looked for beside the config first."""

from pathlib import Path

import pytest

from pfm_llm.config.data import ColumnsConfig
from pfm_llm.config.schema import load_config, parse_config, training_hash


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in a folder of its own; the working folder is another one."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "there" / "mine.yaml"
    path.write_text("name: mine\ndata: {source: rows.csv, items: texts/items.csv}\n")
    return path


def test_paths_are_those_beside_the_config(config: Path) -> None:
    (config.parent / "rows.csv").write_text("")
    (config.parent / "texts").mkdir()
    (config.parent / "texts" / "items.csv").write_text("")
    data = load_config(config).data
    assert data.source == str(config.parent / "rows.csv")
    assert data.items == str(config.parent / "texts" / "items.csv")
    config.write_text("name: mine\ndata: rows.csv\n")
    Path("rows.csv").write_text("")  # another file of that name in the working folder
    assert load_config(config).data.source == str(config.parent / "rows.csv")


def test_what_is_not_beside_the_config_keeps_its_name(config: Path) -> None:
    Path("rows.csv").write_text("")
    assert load_config(config).data.source == "rows.csv"
    (config.parent / "movielens-100k").mkdir()
    config.write_text("name: mine\ndata: movielens-100k\n")
    assert load_config(config).data.source == "movielens-100k"


def test_in_the_working_folder_nothing_changes(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.parent / "rows.csv").write_text("")
    monkeypatch.chdir(config.parent)
    assert load_config("mine.yaml").data.source == "rows.csv"
    assert load_config(config).data.source == "rows.csv"
    assert load_config(config, ["data.source=../other.csv"]).data.source == "../other.csv"


def test_columns_may_be_called_by_numbers() -> None:
    assert ColumnsConfig.model_validate({"user": 0, "rating": 2}) == ColumnsConfig(
        user="0", rating="2"
    )


def test_settings_that_nobody_gives_leave_the_hash_as_it_was() -> None:
    """Of 0.2.0, in which a rating had no default and there was no `reading`."""
    plain = parse_config({"name": "x"})
    assert training_hash(plain) == (
        training_hash(parse_config({"name": "x", "data": {"columns": {"rating": None}}}))
    )
    assert "reading" not in plain.model_dump(mode="json")["data"]
    given = parse_config({"name": "x", "data": {"reading": {"separator": ";"}}})
    assert training_hash(given) != training_hash(plain)
