"""The call of a baseline's script, which trains, chooses on validation and writes its rows."""

import collections
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pfm_llm.base.errors import ConfigError, TrainingError

_log = logging.getLogger(__name__)
_LINES_KEPT = 5


def call_script(
    script: Path,
    arguments: Sequence[str],
    *,
    config: Path,
    seed: int,
    output: Path,
    openings: Path,
) -> None:
    """Run a script to its end, and log what it writes to standard error.

    Args:
        script: The Python file.
        arguments: Its further arguments.
        config: A resolved config; the script takes data, split and evaluation from it.
        seed: For all of the script's randomness.
        output: Where the script writes its rows, as `results.write_results` does.
        openings: Where it counts that it measures test, as `openings.count_opening` does.

    Raises:
        ConfigError: There is no such script.
        TrainingError: The script failed; the message holds the last lines of its standard error.
    """
    if not script.is_file():
        raise ConfigError(f"no script at {script}; paths are relative to the current folder")
    output.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--config", str(config)]
    command += ["--seed", str(seed), "--output", str(output), "--openings", str(openings)]
    command += arguments
    last: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last.append(line.rstrip())
                _log.info("%s: %s", script.stem, line.rstrip())
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        said = " / ".join(last) or "nothing"
        raise TrainingError(f"{script} ended with {process.returncode} and said: {said}")
