"""The scripts, run in this process: what they print, and their exit code."""

import logging
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@dataclass(frozen=True)
class Outcome:
    """What a script left.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str


def run_script(name: str, *arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run ``scripts/<name>`` with these arguments, as ``python scripts/<name>`` would."""
    capsys.readouterr()
    code = 0
    logger = logging.getLogger("pfm_llm")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        finally:
            logger.setLevel(level)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)
