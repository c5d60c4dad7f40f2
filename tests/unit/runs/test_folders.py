"""Which run is meant: by folder, by name, or the newest; and what is said when there is none."""

import itertools
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


def test_without_a_name_it_is_the_run_that_was_started_or_resumed_last(tmp_path: Path) -> None:
    make_run(tmp_path, "z", 100)
    resumed = make_run(tmp_path, "a", 50)
    (resumed / "environment.json").write_text("{}")  # it is of now
    make_run(tmp_path, "m", 150)
    assert find_run(None, tmp_path) == resumed


def test_private_folders_files_and_folders_without_config_are_no_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", 100)
    make_run(tmp_path, "a.private", 900)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert find_run(None, str(tmp_path)) == run


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
    for name, runs in itertools.product((None, "films"), (tmp_path, tmp_path / "absent")):
        with pytest.raises(ConfigError, match=r"no run .*; run `pfm train` first"):
            find_run(name, runs)
