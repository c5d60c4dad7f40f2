"""Locks between processes: the system releases the lock of a process that dies, however it dies."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pfm_llm.base.errors import BusyError
from pfm_llm.base.files import storage_errors

_log = logging.getLogger(__name__)

LOADING = threading.RLock()
"""Held while a model is loaded. Transformers replaces functions of its own meanwhile, and puts them
back in the wrong order where two threads load at a time: no model would tie its weights then."""


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock during the block.

    Args:
        path: The lock's file. It stays when the lock is released, unless the block deletes it.
        busy: The message when another process holds the lock.
        wait: Whether to log ``busy`` and wait for the other process; otherwise it is an error.

    Raises:
        BusyError: Another process holds the lock, and ``wait`` is not given.
        StorageError: The file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    with storage_errors(path):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if not wait:
                raise BusyError(busy) from error
            _log.info("%s", busy)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
