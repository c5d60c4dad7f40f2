"""The folders of a run: which run is meant, and which process has it."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pfm_llm.base.errors import BusyError, CheckpointError, ConfigError, StorageError
from pfm_llm.config.schema import ExperimentConfig, parse_config
from pfm_llm.runs.folders import RunFolders, find_run


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


# --- a run belongs to one process at a time ---------------------------------------------------


def config_in(runs: Path) -> ExperimentConfig:
    return parse_config({"name": "films", "output": {"dir": str(runs)}})


def begin(folders: RunFolders) -> None:
    folders.public.mkdir()
    (folders.public / "config.yaml").touch()
    (folders.public / "environment.json").touch()


def fail_in(
    config: ExperimentConfig, work: Callable[[RunFolders], None], error: type[BaseException]
) -> None:
    with RunFolders.claimed(config) as folders:
        work(folders)
        raise error


def test_starts_of_one_name_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with RunFolders.claimed(config) as first, RunFolders.claimed(config) as second:
        assert [first.public.name, second.public.name] == ["films", "films-2"]
        begin(first)
    with RunFolders.claimed(config) as third:  # the second one has written nothing
        assert third == second


@pytest.mark.parametrize("name", ["films", "films.private"])
def test_folders_with_something_in_them_are_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    with RunFolders.claimed(config_in(tmp_path)) as claimed:
        assert claimed.public.name == "films-2"


@pytest.mark.parametrize("name", ["films", "films.private"])
def test_a_file_in_place_of_a_folder_takes_the_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with RunFolders.claimed(config_in(tmp_path)) as claimed:
        assert claimed.public.name == "films-2"


def test_a_start_that_was_killed_at_its_first_write_leaves_the_name_free(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / ".config.yaml.x.tmp").touch()
    (tmp_path / "films.private").mkdir()
    (tmp_path / "films.private" / "run.lock").touch()
    with RunFolders.claimed(config_in(tmp_path)) as claimed:
        assert claimed.public.name == "films"


@pytest.mark.parametrize("error", [ConfigError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_start_leaves_nothing(
    error: type[BaseException], existed: bool, tmp_path: Path
) -> None:
    runs = tmp_path / "a" / "runs"
    if existed:
        runs.mkdir(parents=True)
    with pytest.raises(error):
        fail_in(config_in(runs), lambda folders: folders.public.mkdir(), error)
    assert (list(runs.iterdir()) == []) if existed else (list(tmp_path.iterdir()) == [])


def test_a_run_that_has_begun_survives_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        fail_in(config_in(tmp_path), begin, ConfigError)
    with RunFolders.to_resume(config_in(tmp_path)) as resumed:
        assert resumed.public == tmp_path / "films"


def test_a_run_in_work_is_refused_to_others(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with RunFolders.claimed(config) as claimed:
        begin(claimed)
        busy = pytest.raises(BusyError, match=rf"working on {claimed.public}; wait for its end")
        with busy, RunFolders.to_resume(config):
            pytest.fail("two processes have the run")
    with RunFolders.to_resume(config):
        pass


def test_a_runs_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    refused = pytest.raises(StorageError, match="cannot write")
    with refused, RunFolders.claimed(config_in(tmp_path / "runs")):
        pytest.fail("a file was used as a folder")


def test_checkpoints_in_the_public_folder_are_to_be_moved(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with RunFolders.claimed(config) as folders:
        begin(folders)
    former = folders.public / "server"
    former.mkdir()
    refused = pytest.raises(CheckpointError, match=rf"mv {former} {folders.server}")
    with refused, RunFolders.to_resume(config):
        pytest.fail("an older run was opened")
    former.rename(folders.server)  # the remedy
    with RunFolders.to_resume(config):
        pass
