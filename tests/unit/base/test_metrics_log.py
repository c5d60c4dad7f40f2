"""The metrics log survives a kill at any byte, and takes nothing but plain figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm_llm.base.errors import CorruptFileError, DataError, StorageError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.protocol.types import Mode

RECORDS = [
    {"round": n, "loss": 7.0 - n, "validation": {"shared_only": {"é": n}}} for n in (1, 2, 3)
]


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def fill(log: MetricsLog) -> None:
    for record in RECORDS:
        log.append(record)


def without_checksum(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if name != "crc32"}


def test_no_file_is_an_empty_log(log) -> None:
    assert log.read() == []
    log.truncate_after(0)
    assert not log.path.exists()


def test_each_record_is_one_json_line_at_once_on_disk(log) -> None:
    for count, record in enumerate(RECORDS, start=1):
        log.append(record)
        lines = log.path.read_text().splitlines()
        assert [without_checksum(line) for line in lines] == RECORDS[:count]
    assert log.path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_truncation_keeps_the_rounds_up_to_the_given_one(log, keep, left) -> None:
    fill(log)
    log.truncate_after(keep)
    assert log.read() == RECORDS[:left]


@settings(max_examples=40)  # each syncs files to disk
@given(cut=st.integers(min_value=0), resumed=st.booleans())
def test_killed_at_any_byte_the_log_keeps_whole_records_and_goes_on(
    tmp_path_factory, cut, resumed
) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    fill(log)
    content = log.path.read_bytes()
    cut %= len(content) + 1
    log.path.write_bytes(content[:cut])
    # A line whose newline alone is missing is whole.
    whole = sum(1 for end in _line_ends(content) if end <= cut)
    assert log.read() == RECORDS[:whole]
    if resumed:
        log.truncate_after(whole)
    log.append({"round": whole + 1})
    assert log.read() == [*RECORDS[:whole], {"round": whole + 1}]
    assert log.path.read_bytes().count(b"\n") == whole + 1


def _line_ends(content: bytes) -> list[int]:
    """Positions just after each line's closing brace."""
    return [i for i, byte in enumerate(content) if byte == ord("\n")]


@pytest.mark.parametrize("bad", [b"{oops}\n", b"[1]\n", b'{"loss": 1}\n', b"\n", b"\xff\n"])
def test_a_bad_line_that_is_not_a_half_written_last_one_is_named(log, bad) -> None:
    fill(log)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + bad + lines[2])
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl, line 2"):
        log.read()


def test_every_flipped_bit_is_found(log) -> None:
    fill(log)
    content = log.path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            log.path.write_bytes(damaged)
            if place >= content.rindex(b"{") and place != len(content):
                # The last line may look half-written; then its round is missing.
                with pytest.raises(CorruptFileError, match=r"metrics\.jsonl"):
                    log.read(3)
            else:
                with pytest.raises(CorruptFileError, match=r"metrics\.jsonl, line"):
                    log.read()


@pytest.mark.parametrize("cut", range(4))
def test_a_log_that_lacks_a_committed_round_is_named(log, cut) -> None:
    fill(log)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:cut]))
    assert log.read(cut) == RECORDS[:cut]
    for action in (log.read, log.truncate_after):
        with pytest.raises(CorruptFileError, match=rf"ends after round {cut} .*up to 4; restore"):
            action(4)


@pytest.mark.parametrize("order", [(0, 1, 1, 2), (1, 2), (0, 2), (1, 0, 2)])
def test_lines_that_are_missing_repeated_or_moved_are_named(log, order) -> None:
    fill(log)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[place] for place in order))
    with pytest.raises(CorruptFileError, match=r"line \d: holds round \d, must be round \d"):
        log.read()


def test_a_log_of_version_0_2_is_read_and_gets_checksums(log) -> None:
    log.path.parent.mkdir()
    log.path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert log.read() == RECORDS
    log.truncate_after(3)
    assert log.path.read_bytes().count(b"crc32") == 3
    assert log.read() == RECORDS


def test_a_folder_in_its_place_is_a_storage_error(log) -> None:
    log.path.mkdir(parents=True)
    for action in (log.read, lambda: log.append({"round": 1}), lambda: log.truncate_after(0)):
        with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl: Is a directory"):
            action()


def test_numbers_that_are_not_finite_become_null_and_numpy_scalars_plain(log) -> None:
    log.append(
        {
            "round": np.int64(1).item(),
            "loss": float("nan"),
            "aggregated_norm": np.float32("inf"),
            "seconds": np.float32(0.5),
            "refused": np.int64(2),
            "resumed": True,
            "validation": {Mode.SHARED_ONLY: {"ndcg@10": None}},
        }
    )
    assert log.read() == [
        {
            "round": 1,
            "loss": None,
            "aggregated_norm": None,
            "seconds": 0.5,
            "refused": 2,
            "resumed": True,
            "validation": {"shared_only": {"ndcg@10": None}},
        }
    ]


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.tensor(1.0), np.zeros(1), [0.1, 0.2], (1,), {3}, b"x"]
)
def test_arrays_and_sequences_never_enter_the_log(log, value) -> None:
    with pytest.raises(DataError, match=r"record\.private\.b is a"):
        log.append({"round": 1, "private": {"b": value}})
    assert not log.path.exists()


@pytest.mark.parametrize(
    "record", [{}, {"loss": 1.0}, {"round": "1"}, {"round": None}, {"round": True}]
)
def test_a_record_without_a_round_is_refused(log, record) -> None:
    with pytest.raises(DataError, match="'round'"):
        log.append(record)
    assert not log.path.exists()


def test_a_log_that_cannot_be_written_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        MetricsLog(tmp_path / "run" / "metrics.jsonl").append({"round": 1})
