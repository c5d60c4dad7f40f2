"""The start of every command: environment, logging, and errors without a traceback."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from pfm_llm.base.errors import PfmError
from pfm_llm.base.terminal import printable

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of the signal."""


_WITH_HANDLERS = {"huggingface_hub", "datasets"}
"""Libraries that print their warnings themselves, and would be heard twice."""
_RETRIES = "huggingface_hub.utils._http"
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]*")


def run_safely(command: Callable[[], None], when_interrupted: str = "interrupted") -> None:
    """Run a command; a `PfmError` becomes one message and an exit code.

    Args:
        command: The command.
        when_interrupted: The message after Ctrl-C.

    Raises:
        SystemExit: The command failed, or was interrupted.
    """
    prepare()
    try:
        command()
    except PfmError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def prepare() -> None:
    """Set the environment variables that torch and tokenizers read at start-up, and logging."""
    _forget_folder_of_script()
    # Before torch starts: waiting threads that spin for long starve each other on a busy machine,
    # and those that sleep at once are late for the next of many small operations.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries; ours log lines there
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.partition(".")[0] not in _WITH_HANDLERS)
    handler.addFilter(_hide_signatures)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(_RETRIES).addFilter(_hide_signatures)
    # Not the root logger: at INFO, httpx writes each request with its signed URL.
    logging.getLogger("pfm_llm").setLevel(logging.INFO)
    # transformers warns about its own code, which a user cannot change.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


class _Printable(logging.Formatter):
    """Log lines without control characters: a message may name a file or title of others."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return printable(super().format(record))


def _hide_signatures(record: logging.LogRecord) -> bool:
    """Cut the query off each address in a record: it may hold a signature that grants access."""
    record.msg, record.args = _QUERY.sub(r"\1", record.getMessage()), ()
    return True


def is_main_process() -> bool:
    """Whether this is the process that prints, when a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def _forget_folder_of_script() -> None:
    """Remove the script's folder from the path; scripts/evaluate.py would hide that library."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None:
        folder = Path(script).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
