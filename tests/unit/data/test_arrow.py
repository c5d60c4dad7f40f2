"""Interactions on disk: equal when read back, whole or absent, damage is noticed."""

import dataclasses
import errno
import stat
from pathlib import Path

import datasets
import numpy as np
import pytest

from pfm_llm.base.errors import CorruptFileError, DiskSpaceError
from pfm_llm.base.files import read_json, write_json
from pfm_llm.data.arrow import from_arrow, to_arrow
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.report import LoadReport

CATALOGUE = Catalogue(("7", "é"), {"title": ("Ash", "Bür"), "id": ("", "1")})
PLAIN = Interactions(CATALOGUE, ("u", "v"), np.array([0, 1, 3]), np.array([1, 0, 1]))
FULL = dataclasses.replace(
    PLAIN,
    timestamps=np.array([2**60 + 1, -5, 0]),
    ratings=np.array([0.1, 2.0, 3.0]),
    user_fields={"age": ("31", ""), "length": ("long", "short")},
)
EMPTY = Interactions(CATALOGUE, ("u",), np.array([0, 0]), np.zeros(0))
NOBODY = Interactions(CATALOGUE, (), np.array([0]), np.zeros(0))
REPORT = LoadReport(3, 3, 2, 2, {"torn": 1}, ("an example",), ("a note",))
LONG = Interactions(CATALOGUE, ("u",), np.array([0, 5000]), np.arange(5000) % 2)


@pytest.mark.parametrize("interactions", [PLAIN, FULL, EMPTY, NOBODY, LONG])
def test_what_is_read_equals_what_was_written(interactions: Interactions, tmp_path: Path) -> None:
    to_arrow(interactions, REPORT, tmp_path / "a" / "b")
    found, report = from_arrow(tmp_path / "a" / "b")
    assert report == REPORT
    assert found.content_hash() == interactions.content_hash()
    assert found.catalogue == interactions.catalogue
    assert found.user_fields == interactions.user_fields


def test_the_folder_is_private_and_opens_with_datasets(tmp_path: Path) -> None:
    to_arrow(FULL, REPORT, tmp_path / "x")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    assert datasets.load_from_disk(str(tmp_path / "x" / "interactions"))["item"][:] == [1, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_writing_again_replaces(tmp_path: Path) -> None:
    to_arrow(PLAIN, REPORT, tmp_path / "x")
    to_arrow(FULL, REPORT, tmp_path / "x")
    assert from_arrow(tmp_path / "x")[0].content_hash() == FULL.content_hash()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_leaves_the_old_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_arrow(PLAIN, REPORT, tmp_path / "x")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", fail)
    with pytest.raises(DiskSpaceError):
        to_arrow(FULL, REPORT, tmp_path / "x")
    assert from_arrow(tmp_path / "x")[0].content_hash() == PLAIN.content_hash()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_one_flipped_bit_anywhere_in_the_tables_is_noticed(tmp_path: Path) -> None:
    to_arrow(FULL, REPORT, tmp_path / "x")
    tables = sorted((tmp_path / "x").rglob("*.arrow"))
    assert len(tables) == 3
    for table in tables:
        content = table.read_bytes()
        for position in range(0, len(content), 97):
            damaged = bytearray(content)
            damaged[position] ^= 1
            table.write_bytes(damaged)
            with pytest.raises(CorruptFileError, match="does not match its recorded checksum"):
                from_arrow(tmp_path / "x")
        table.write_bytes(content)
    assert from_arrow(tmp_path / "x")[0].content_hash() == FULL.content_hash()


@pytest.mark.parametrize("missing", ["manifest.json", "users/state.json"])
def test_a_missing_file_is_noticed(missing: str, tmp_path: Path) -> None:
    to_arrow(FULL, REPORT, tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    with pytest.raises(CorruptFileError, match="cannot be read"):
        from_arrow(tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 0),
        ("files", None),
        ("files", {"manifest.json": "0"}),
        ("report", None),
        ("report", {}),
        ("report", {**dataclasses.asdict(REPORT), "other": 1}),
    ],
)
def test_another_manifest_is_refused(key: str, value: object, tmp_path: Path) -> None:
    to_arrow(FULL, REPORT, tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    write_json(path, {**read_json(path), key: value})
    with pytest.raises(CorruptFileError):
        from_arrow(tmp_path / "x")


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_a_manifest_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    to_arrow(FULL, REPORT, tmp_path / "x")
    (tmp_path / "x" / "manifest.json").write_text(content)
    with pytest.raises(CorruptFileError):
        from_arrow(tmp_path / "x")


def test_progress_bars_stay_as_the_user_set_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    were_off = datasets.are_progress_bars_disabled()
    try:
        datasets.enable_progress_bars()
        to_arrow(PLAIN, REPORT, tmp_path / "x")
        assert not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        to_arrow(PLAIN, REPORT, tmp_path / "x")
        assert datasets.are_progress_bars_disabled()
    finally:
        (datasets.disable_progress_bars if were_off else datasets.enable_progress_bars)()
    assert "Saving" not in capfd.readouterr().err
