"""Damaged files and full disks: the error says what to do, and no committed round is lost."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    DiskSpaceError,
    PfmError,
    StorageError,
)
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import evaluate_run, run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.checkpoint import CheckpointStore
from tests.support.tiny import (
    Tiny,
    leftovers,
    results_of,
)

# --- what is damaged on disk ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    """Clients that cache trunk states: what they must keep for themselves, and may lose."""
    return tiny.by_tokens


@pytest.fixture(scope="module")
def pristine(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    return run_experiment(tiny.config(tmp_path_factory.mktemp("pristine")))


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, with its private folder."""
    shutil.copytree(pristine.parent, tmp_path / "runs")
    return tmp_path / "runs" / "tiny"


def flip(path: Path, position: int = -5) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


COMMITS = "../tiny.private/server/commit.json"
DAMAGE = [pytest.param(flip, id="a bit flipped"), pytest.param(cut, id="cut off")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_checkpoint(damage: Callable[[Path], None], copied: Path) -> None:
    damage(copied.with_name("tiny.private") / "server" / "round_000004.safetensors")
    results = (copied / "results.json").read_bytes()
    for use in (evaluate_run, Recommender.from_pretrained):
        with pytest.raises(CorruptFileError, match=r"checkpoint of round 4.*round 2 is kept"):
            use(copied)
    assert (copied / "results.json").read_bytes() == results


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        (
            COMMITS,
            "{",
            CorruptFileError,
            r"commit\.json is damaged.*start again",
        ),
        (
            COMMITS,
            None,
            CheckpointError,
            r"no committed round; run .*--resume",
        ),
        ("config.yaml", None, ConfigError, r"is no run: it has no config\.yaml"),
        ("config.yaml", "name: [", ConfigError, r"config\.yaml: not valid YAML"),
        (
            "metrics.jsonl",
            "{}\n{}\n",
            CorruptFileError,
            r"metrics\.jsonl, line 1.*restore the file",
        ),
        ("metrics.jsonl", None, CorruptFileError, r"metrics\.jsonl .*lacks the rounds up to 4"),
        ("environment.json", "{", CorruptFileError, r"environment\.json is not valid JSON"),
        ("environment.json", None, CheckpointError, r"environment\.json is missing.*restore"),
    ],
)
def test_corrupt_or_missing_file_of_a_run(
    name: str, content: str | None, error: type[PfmError], match: str, copied: Path
) -> None:
    (copied / name).unlink() if content is None else (copied / name).write_text(content)
    with pytest.raises(error, match=match):
        evaluate_run(copied)


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "environment.json", "trained_on.json", "results.json", "results.md"),
        *(COMMITS, "../tiny.private/server/round_000004.safetensors"),
        "../tiny.private/run.lock",
        "../tiny.private/lists.json",
    ],
)
def test_a_folder_in_place_of_a_file_of_a_run(name: str, copied: Path) -> None:
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(PfmError, match=Path(name).name):
        evaluate_run(copied)


def test_a_folder_in_place_of_a_private_state(copied: Path) -> None:
    path = sorted(copied.with_name("tiny.private").glob("clients/*/private.r*"))[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=rf"client '{path.parent.name}'.*it is a folder"):
        evaluate_run(copied)


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_private_state_names_the_client(
    damage: Callable[[Path], None], copied: Path
) -> None:
    path = sorted(copied.with_name("tiny.private").glob("clients/*/private.r*"))[0]
    damage(path)
    client_id = path.parent.name
    with pytest.raises(CorruptFileError, match=rf"client '{client_id}'.*delete the file"):
        evaluate_run(copied)
    path.unlink()  # the remedy
    evaluate_run(copied)


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_caches_are_built_again(
    damage: Callable[[Path], None],
    tiny: Tiny,
    tmp_path: Path,
    pristine: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    run = run_experiment(tiny.config(tmp_path / "runs"))
    kinds = {
        "trunk cache": run.with_name("tiny.private").rglob("trunk/*.safetensors"),
        "item states": (tmp_path / "cache" / "items").iterdir(),
        "cached interactions": (tmp_path / "cache" / "interactions").rglob("*.arrow"),
    }
    for paths in kinds.values():
        damaged = [damage(path) for path in list(paths)]
        assert damaged
    caplog.clear()
    evaluate_run(run)
    assert [kind for kind in kinds if kind not in caplog.text] == []
    assert results_of(run)["rows"] == results_of(pristine)["rows"]
    caplog.clear()
    evaluate_run(run)
    assert [kind for kind in kinds if kind in caplog.text] == []


# --- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """Makes every write fail of which the file's path has a given part; returns the remedy."""
    fsync = os.fsync

    def fill(part: str, after: int = 0) -> Callable[[], None]:
        seen = 0

        def full(handle: int) -> None:
            nonlocal seen
            if part in os.readlink(f"/proc/self/fd/{handle}"):
                seen += 1
                if seen > after:
                    raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        return lambda: monkeypatch.setattr(os, "fsync", fsync)

    return fill


@pytest.fixture(scope="module")
def whole_results(pristine: Path) -> Any:
    return results_of(pristine)["rows"]


@pytest.mark.parametrize("part", ["config.yaml", "environment.json"])
def test_disk_full_before_the_first_round_leaves_nothing(
    part: str, tiny: Tiny, tmp_path: Path, full_disk: Callable[..., Any]
) -> None:
    full_disk(part)
    with pytest.raises(DiskSpaceError, match=rf"{part}.*free some disk space"):
        run_experiment(tiny.config(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "after", "committed"),
    [
        ("private.r000003", 1, 2),
        ("metrics.jsonl", 2, 2),
        ("round_000002", 0, 0),
        ("round_000004", 0, 2),
        ("commit.json", 1, 2),
        ("personalised.r", 3, 4),
        ("results.json", 0, 4),
        ("loss.png", 0, 4),
        ("recommender_head", 0, 4),
        ("README.md", 0, 4),
    ],
)
def test_disk_full_in_a_run_loses_nothing_that_was_committed(
    part: str,
    after: int,
    committed: int,
    tiny: Tiny,
    tmp_path: Path,
    full_disk: Callable[..., Any],
    whole_results: Any,
) -> None:
    config = tiny.config(tmp_path)
    free = full_disk(part, after)
    with pytest.raises(DiskSpaceError, match=rf"{part}.*free some disk space and run again"):
        run_experiment(config)
    run = tmp_path / "tiny"
    assert (CheckpointStore(RunFolders.of(run).server).rounds() or (0,))[-1] == committed
    assert leftovers(run, run.with_name("tiny.private")) == []
    free()
    run_experiment(config, resume=True)
    assert results_of(run)["rows"] == whole_results


def test_disk_full_while_peft_writes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, folder: str, **_: Any) -> None:
        half = Path(folder) / "shared"
        half.mkdir(parents=True)
        (half / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", full)
    with pytest.raises(DiskSpaceError, match="shared_adapter"):
        run_experiment(tiny.config(tmp_path, federation__num_rounds=1))
    assert leftovers(tmp_path / "tiny") == []
    assert not list((tmp_path / "tiny").rglob("adapter_model*"))


@pytest.mark.parametrize("part", ["/trunk/", "/items/"])
def test_disk_too_full_for_caches_costs_time_alone(
    part: str,
    tiny: Tiny,
    tmp_path: Path,
    full_disk: Callable[..., Any],
    whole_results: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PFM_LLM_CACHE", str(tmp_path / "cache"))
    full_disk(part)
    run = run_experiment(tiny.config(tmp_path / "runs"))
    assert "going on without" in caplog.text
    assert results_of(run)["rows"] == whole_results
    assert leftovers(tmp_path) == []


def test_output_folder_that_is_a_file(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path / 'runs' / 'tiny'}"):
        run_experiment(tiny.config(tmp_path / "runs"))
    assert (tmp_path / "runs").read_text() == "a file"
