"""Calls a baseline's script, which trains, chooses on validation and writes its own figures."""

import collections
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.errors import ConfigError, TrainingError

_log = logging.getLogger(__name__)
_LINES_KEPT = 5


@dataclass(frozen=True)
class ScriptCall:
    """One call.

    Attributes:
        script: The Python file.
        config: A resolved config: data, split and evaluation are to be taken from it.
        seed: For all of the script's randomness.
        output: Where it writes its rows, as `results.write_results` does.
        arguments: Further ones.
    """

    script: Path
    config: Path
    seed: int
    output: Path
    arguments: tuple[str, ...] = ()


def call_script(call: ScriptCall) -> None:
    """Run a script to its end; what it says on standard error is logged.

    Raises:
        ConfigError: There is no such script.
        TrainingError: It failed; the message holds the end of what it said.
    """
    if not call.script.is_file():
        raise ConfigError(f"no script at {call.script}; paths are relative to the current folder")
    call.output.unlink(missing_ok=True)
    command = [sys.executable, str(call.script), "--config", str(call.config)]
    command += ["--seed", str(call.seed), "--output", str(call.output), *call.arguments]
    last: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last.append(line.rstrip())
                _log.info("%s: %s", call.script.stem, line.rstrip())
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        said = " / ".join(last) or "nothing"
        raise TrainingError(f"{call.script} ended with {process.returncode} and said: {said}")
