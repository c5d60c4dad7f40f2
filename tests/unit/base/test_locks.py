"""Locks between processes."""

import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from pfm_llm.base.errors import BusyError, StorageError
from pfm_llm.base.locks import locked


def hold_for_ever(path: Path, ready: threading.Event) -> None:
    with locked(path, "busy"):
        ready.set()
        signal.pause()


@pytest.fixture
def elsewhere(tmp_path: Path):  # type: ignore[no-untyped-def]
    """The lock ``tmp_path / "lock"``, held by another process."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold_for_ever, args=(tmp_path / "lock", ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_lock_is_refused_to_a_second_process(elsewhere: object, tmp_path: Path) -> None:
    refused = pytest.raises(BusyError, match="wait for the other one")
    with refused, locked(tmp_path / "lock", "wait for the other one"):
        pytest.fail("the lock was given twice")
    with locked(tmp_path / "other", "busy"):
        pass


def test_a_killed_process_holds_no_lock(elsewhere: multiprocessing.Process, tmp_path: Path) -> None:
    assert elsewhere.pid is not None
    os.kill(elsewhere.pid, signal.SIGKILL)
    elsewhere.join()
    with locked(tmp_path / "lock", "busy"):
        pass


def test_whoever_waits_says_so_and_gets_the_lock_in_turn(
    elsewhere: multiprocessing.Process, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The library's logger has a level of its own once a command has run in this process.
    caplog.set_level(logging.INFO, "pfm_llm")
    threading.Timer(0.2, elsewhere.kill).start()
    with locked(tmp_path / "lock", "waiting for another process", wait=True):
        assert not elsewhere.is_alive()
    assert caplog.messages == ["waiting for another process"]


def test_the_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", "busy"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", "busy"):
        pass


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    refused = pytest.raises(StorageError, match=r"/lock: Is a directory")
    with refused, locked(tmp_path / "lock", "busy"):
        pytest.fail("a folder was locked")
