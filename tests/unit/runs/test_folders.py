"""Which run is meant: by folder, by name, or the newest; and what is said when there is none."""

import os
from pathlib import Path

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.runs.folders import find_run


def make_run(runs: Path, name: str, started_s: int = 0) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    os.utime(folder / "config.yaml", (started_s, started_s))
    return folder


def test_a_run_is_found_by_its_folder_and_by_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, "films")
    assert find_run(run, "elsewhere") == find_run(str(run), "elsewhere") == run
    assert find_run("films", tmp_path) == run


def test_without_a_name_it_is_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path, "b", 1)
    newest = make_run(tmp_path, "a", 2)
    assert find_run(None, tmp_path) == newest


def test_a_folder_without_a_config_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    with pytest.raises(ConfigError, match=r"films is no run: it has no config\.yaml; .* has none"):
        find_run(tmp_path / "films", tmp_path)


def test_a_run_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    for number in range(11):
        make_run(tmp_path, f"films-{number}", number)
    with pytest.raises(ConfigError) as caught:
        find_run(tmp_path / "filns-10", tmp_path)
    message = str(caught.value)
    assert f"no run at {tmp_path / 'filns-10'}; did you mean films-10?" in message
    assert message.endswith(f"{tmp_path} has films-10, {NEXT_NINE}, …")


NEXT_NINE = ", ".join(f"films-{number}" for number in range(9, 0, -1))


def test_without_any_run_the_way_to_one_is_said(tmp_path: Path) -> None:
    for name in (None, "films"):
        with pytest.raises(ConfigError, match=r"no run .*; run `pfm train` first"):
            find_run(name, tmp_path)
