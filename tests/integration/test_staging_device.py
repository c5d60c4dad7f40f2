"""What is exported for a device or another server is not published with the shared adapter."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfm_llm.base.errors import ArtefactError, PrivateLeakError
from pfm_llm.cli.main import make_app
from pfm_llm.publish.artefact import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from pfm_llm.publish.device.export import (
    CAT_FILE,
    PRIVATE_FILE,
    SHARED_FILE,
    export_cat,
    export_gguf,
)
from pfm_llm.publish.staging import stage
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.opening import open_run
from tests.support.exports import copy_of, exported, in_a_plot, private, run, seal
from tests.support.tiny import Tiny
from tests.support.tiny_gguf import write_saved_base

__all__ = ["exported", "private", "run"]


def pfm(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(make_app(), [str(word) for word in words])
    return found.exit_code, found.output + str(found.exception or "")


@pytest.fixture(scope="module")
def device(run: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that `pfm export` writes of a run and one of its users."""
    folder = tmp_path_factory.mktemp("device")
    base = write_saved_base(folder / "base.gguf", tiny.model)
    opened, trained = open_run(run)
    user = opened.data.interactions.user_ids[0]
    Recommender.of_run(opened, trained, user).export_private(folder / "mine")
    given = ("export", "--run", run, "--private", folder / "mine", "--base", base)
    for out, more in {
        "gguf": (), "cat": ("--cat",), "peft": ("--cat", "--format", "peft")
    }.items():  # fmt: skip
        code, output = pfm(*given, "--out", folder / out, *more)
        assert code == 0, output
    return folder


def test_the_command_names_what_it_writes(device: Path, run: Path, tmp_path: Path) -> None:
    assert {path.name for path in (device / "gguf").iterdir()} == {SHARED_FILE, PRIVATE_FILE}
    assert {path.name for path in (device / "cat").iterdir()} == {CAT_FILE}
    assert {path.name for path in (device / "peft").iterdir()} == {
        ADAPTER_CONFIG_FILE, ADAPTER_FILE
    }  # fmt: skip
    assert {(device / name).stat().st_mode & 0o777 for name in ("gguf", "cat", "peft")} == {0o700}
    code, output = pfm(
        "export", "--adapter", run / "shared_adapter", "--base", device / "base.gguf",
        "--out", tmp_path / "device",
    )  # fmt: skip
    assert code == 0, output
    assert output.split() == [str(tmp_path / "device" / SHARED_FILE)]
    shared = (tmp_path / "device" / SHARED_FILE).read_bytes()
    assert shared == (device / "gguf" / SHARED_FILE).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cat",), "give --private"),
        (("--format", "peft", "--private", "mine"), "--cat makes one of both"),
        (("--private", "nowhere"), "adapter_config.json is missing"),
    ],
)
def test_wrong_options_write_nothing(
    words: tuple[str, ...], said: str, run: Path, tmp_path: Path
) -> None:
    code, output = pfm("export", "--run", run, "--out", tmp_path / "out", *words)
    assert code != 0
    assert said in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "device", "shared_adapter/device"])
def test_nothing_is_written_where_a_run_is_shared(place: str, device: Path, run: Path) -> None:
    before = sorted(run.rglob("*"))
    code, output = pfm(
        "export", "--run", run, "--private", device / "mine", "--base", device / "base.gguf",
        "--out", run / place,
    )  # fmt: skip
    assert code != 0
    assert "may be shared" in output
    assert sorted(run.rglob("*")) == before


def beside(name: str) -> Callable[[Path, Path], None]:
    def put(folder: Path, device: Path) -> None:
        shutil.copy(device / name, folder)

    return put


def in_the_place_of_the_adapter(folder: Path, device: Path) -> None:
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
        shutil.copy(device / "peft" / name, folder / name)
    seal(folder)


def as_an_end_of_a_plot(name: str) -> Callable[[Path, Path], None]:
    def put(folder: Path, device: Path) -> None:
        in_a_plot(folder, (device / name).read_bytes())
        seal(folder)

    return put


@pytest.mark.parametrize(
    ("put", "error"),
    [
        (beside(f"gguf/{PRIVATE_FILE}"), ArtefactError),
        (beside(f"cat/{CAT_FILE}"), ArtefactError),
        (as_an_end_of_a_plot(f"gguf/{PRIVATE_FILE}"), PrivateLeakError),
        (as_an_end_of_a_plot(f"cat/{CAT_FILE}"), PrivateLeakError),
        (as_an_end_of_a_plot(f"peft/{ADAPTER_FILE}"), PrivateLeakError),
        (in_the_place_of_the_adapter, PrivateLeakError),
    ],
)
def test_a_private_lora_is_refused_in_each_form(
    put: Callable[[Path, Path], None],
    error: type[ArtefactError],
    device: Path,
    exported: Path,
    private: Path,
    tmp_path: Path,
) -> None:
    stage(copy_of(exported, tmp_path / "honest"), tmp_path / "staged", private)
    put(exported, device)
    with pytest.raises(error):
        stage(exported, tmp_path / "refused", private)


def test_so_is_one_that_is_read_off_the_history(tiny: Tiny, tmp_path: Path) -> None:
    """Its factors are products of shared ones with the user's coefficients."""
    run = run_experiment(tiny.config(tmp_path / "runs", method="pfm"))
    device, private = tmp_path / "device", RunFolders.of(run).private
    base = write_saved_base(tmp_path / "base.gguf", tiny.model)
    opened, trained = open_run(run)
    user = opened.data.interactions.user_ids[0]
    Recommender.of_run(opened, trained, user).export_private(tmp_path / "mine")
    shared = run / "shared_adapter"
    export_gguf(shared, tmp_path / "mine", device / "gguf", base)
    export_gguf(shared, tmp_path / "mine", device / "cat", base, cat=True)
    export_cat(shared, tmp_path / "mine", device / "peft")
    puts = (
        beside(f"gguf/{PRIVATE_FILE}"),
        beside(f"cat/{CAT_FILE}"),
        as_an_end_of_a_plot(f"gguf/{PRIVATE_FILE}"),
        in_the_place_of_the_adapter,
    )
    for number, put in enumerate(puts):
        folder = copy_of(shared, tmp_path / f"exported-{number}")
        put(folder, device)
        with pytest.raises(ArtefactError):
            stage(folder, tmp_path / f"refused-{number}", private)
