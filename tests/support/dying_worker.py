"""A worker that is killed when it is asked to mask: it has shared its secrets, and sends nothing.

python -m tests.support.dying_worker SITE
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pfm_llm.cli.node import serve
from pfm_llm.node.worker import Worker


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody outlives SIGKILL")


if __name__ == "__main__":
    Worker.mask = die  # type: ignore[method-assign, assignment]
    serve(Path(sys.argv[1]))
