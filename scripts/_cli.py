"""What the scripts share: start-up settings, logging, and errors without a traceback."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Python puts this folder first on the path, where evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]


def run_safely(
    command: Callable[[argparse.Namespace], None],
    arguments: argparse.Namespace,
    when_interrupted: str = "interrupted; --resume goes on from the last commit",
) -> None:
    """Run a command; a deliberate error is one message and its exit code."""
    prepare()

    from pfm_llm.base.errors import PfmError

    try:
        command(arguments)
    except PfmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        raise SystemExit(130) from None


def prepare() -> None:
    """Set what torch and its companions read when they start, and where messages go."""
    # Before torch starts: waiting threads that spin for long starve each other on a busy machine,
    # and those that sleep at once are late for the next of many small operations.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries; ours log lines there
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # From inside the library; nothing that a user could change.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def is_main_process() -> bool:
    """Whether this is the process that prints, when a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def default_config() -> Path:
    """The config that runs when none is named."""
    return _HERE.parent / "configs" / "quickstart.yaml"
