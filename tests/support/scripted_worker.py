"""A worker that follows a script: what befalls it in which round.

python -m tests.support.scripted_worker SITE

Beside SITE lies ``<SITE>.script``, JSON: number of a round to one of `FAULTS`. It is read again for
each round. ``<SITE>.did-<round>`` appears when a request to train has been dealt with.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pfm_llm.cli.node import serve
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.messages import TrainReply, TrainRequest

SECRET = "user-31415 has met The Third Man"
"""Text of an exception."""
FAULTS = ("hold", "die", "fail", "full", "stop")
"""Wait for ``<SITE>.go-<round>``; be killed once trained; raise; have a full disk; stand still.

``<SITE>.held-<round>`` says that a worker waits.
"""
OLD = "old"
"""In place of a round: the contract is that of an older version."""


def beside(site: Path, suffix: str) -> Path:
    """A file beside a site's, such as its script."""
    return site.with_name(f"{site.name}.{suffix}")


def write_script(site: Path, **faults: str) -> None:
    """Give a site its script; a key is ``r`` and the number of a round."""
    found = {key.removeprefix("r"): fault for key, fault in faults.items()}
    beside(site, "script").write_text(json.dumps(found))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def follow(
    site: Path, train: Callable[[Worker, TrainRequest], TrainReply]
) -> Callable[[Worker, TrainRequest], TrainReply]:
    """The training of a worker that something befalls."""

    def befallen(worker: Worker, request: TrainRequest) -> TrainReply:
        fault = json.loads(beside(site, "script").read_text()).get(str(request.round_number))
        if fault == "fail":
            raise ZeroDivisionError(SECRET)
        if fault == "hold":
            beside(site, f"held-{request.round_number}").touch()
            while not beside(site, f"go-{request.round_number}").exists():
                time.sleep(0.1)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        with full_disk() if fault == "full" else contextlib.nullcontext():
            reply = train(worker, request)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    def noted(worker: Worker, request: TrainRequest) -> TrainReply:
        try:
            return befallen(worker, request)
        finally:
            beside(site, f"did-{request.round_number}").touch()

    return noted


if __name__ == "__main__":
    own = Path(sys.argv[1])
    Worker.train = follow(own, Worker.train)  # type: ignore[method-assign]
    if OLD in json.loads(beside(own, "script").read_text()):
        UpdateContract.hash = lambda self: hashlib.sha256(b"old").hexdigest()  # type: ignore[method-assign]
    serve(own)
