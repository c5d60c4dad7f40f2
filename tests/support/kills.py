"""kill -9 a run at random moments and resume it: `make kills`.

A chain is one tiny run in a world of its own, with an empty cache. Its process first prepares an
asset, then trains, commits, measures and exports. It is killed up to four times, each time at a
moment that the seed draws: half of them at a point in time, half of them around a file that is put
in place. Then it is resumed to its end, and every tensor, metric and result must have the bits of a
run that was never killed.
"""

import argparse
import functools
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.assets import WheelAsset, obtain
from pfm_llm.runs.environment import environment
from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny, leftovers, make_tiny, metrics_of, results_of, tensor_files

SETTINGS: dict[str, Any] = {
    "federation__num_rounds": 6,
    "evaluation__every": 3,
    "evaluation__baselines": ["popularity"],
}
MOST_KILLS_OF_A_RUN = 4
_WHEEL = "toy-1.0-py3-none-any.whl"
_FILES = ("interactions.csv", "items.csv")

Arm = Callable[[], None]
"""Prepares a child to kill itself later."""


class World:
    """A place where one run after the other is killed.

    Args:
        folder: An empty folder.
        seed: Decides when the runs are killed.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._draw = random.Random(seed)
        self._tiny = make_tiny(folder / "world")
        with zipfile.ZipFile(folder / _WHEEL, "w") as archive:
            for name in _FILES:
                archive.write(folder / "world" / name, f"toy/{name}")
        self._sha256 = hashlib.sha256((folder / _WHEEL).read_bytes()).hexdigest()
        self._place = folder / "place"
        self._begin()
        started = time.monotonic()
        self._in_child(None)
        self._seconds = time.monotonic() - started
        self._whole = self._end()
        self._begin()
        self._in_child(functools.partial(_count, folder / "count"))
        self._num_files = int((folder / "count").read_text())

    def chain(self, most_kills: int) -> tuple[int, list[str]]:
        """Kill a run some times, and resume it to its end.

        Args:
            most_kills: At most so many kills; at least one.

        Returns:
            The number of kills, and names of what differs from an uninterrupted run.
        """
        kills = 0
        while not kills:  # a run that is faster than the first one ends before a drawn time
            self._begin()
            while kills < most_kills and self._in_child(*self._moment()):
                kills += 1
        if kills == most_kills:
            self._in_child(None)
        end = self._end()
        return kills, [name for name in end if end[name] != self._whole.get(name)]

    def _moment(self) -> tuple[Arm | None, float | None]:
        if self._draw.random() < 0.5:
            return None, self._draw.uniform(0, self._seconds)
        nth, after = self._draw.randint(1, self._num_files), self._draw.random() < 0.5
        return functools.partial(_die_at, nth, after), None

    def _begin(self) -> None:
        """Empty the place of the runs: its path is in the checkpoints."""
        shutil.rmtree(self._place, ignore_errors=True)
        (self._place / "cache" / "wheels").mkdir(parents=True)
        (self._place / "cache" / "wheels" / _WHEEL).symlink_to(self._folder / _WHEEL)

    def _in_child(self, arm: Arm | None, seconds: float | None = None) -> bool:
        """Start or resume the run in a child; returns whether it was killed."""
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            code = 1
            try:
                if arm is not None:
                    arm()
                _run(self._tiny, self._place, self._sha256)
                code = 0
            finally:
                os._exit(code)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # a child that has ended waits as a zombie
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.waitstatus_to_exitcode(status) == 0, "a run failed"
        return killed

    def _end(self) -> dict[str, Any]:
        """All that must be equal, by what it is."""
        run = self._place / "runs" / "tiny"
        return {
            **tensor_files(run),
            "tensor files": sorted(tensor_files(run)),
            "metrics": metrics_of(run),
            "rows": results_of(run)["rows"],
            "runs": sorted(path.name for path in run.parent.iterdir()),
            "cache": sorted(path.name for path in (self._place / "cache").iterdir()),
            "temporary files": leftovers(run, run.with_name("tiny.private")),
        }


def _run(tiny: Tiny, place: Path, sha256: str) -> None:
    os.environ["PFM_LLM_CACHE"] = str(place / "cache")
    members = tuple(f"toy/{name}" for name in _FILES)
    data = obtain(WheelAsset("toy", "toy==1.0", _WHEEL, sha256, members, 1_000_000))
    source, items = (str(data / name) for name in _FILES)
    config = tiny.config(place / "runs", **SETTINGS, data__source=source, data__items=items)
    run_experiment(config, resume=(place / "runs" / "tiny" / "config.yaml").exists())


def _at_each_file(act: Callable[[bool], None]) -> None:
    """Call ``act`` before (False) and after (True) each file or folder that is put in place."""
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def watched(source: Any, target: Any, original: Any = original, **how: Any) -> None:
            act(False)
            original(source, target, **how)
            act(True)

        setattr(os, name, watched)


def _count(into: Path) -> None:
    seen = 0

    def act(after: bool) -> None:
        nonlocal seen
        seen += after
        into.write_text(str(seen))

    _at_each_file(act)


def _die_at(nth: int, wanted: bool) -> None:
    seen = 0

    def act(after: bool) -> None:
        nonlocal seen
        seen += not after
        if seen == nth and after is wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    _at_each_file(act)


def main() -> None:
    """Kill runs until the wanted number of kills is reached; write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/faults/kills.json"))
    options = parser.parse_args()
    kills = equal = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options.seed)
        while kills < options.kills:
            more, differing = world.chain(min(MOST_KILLS_OF_A_RUN, options.kills - kills))
            kills, equal = kills + more, equal + (0 if differing else more)
            print(f"{equal} of {kills} kills left no trace {differing or ''}", flush=True)  # noqa: T201
    found = {
        "kills": kills,
        "resumed_bit_equal": equal,
        "seed": options.seed,
        "command": "make kills",
        "environment": environment(seed=options.seed, dtype="float32", threads=1, num_processes=1),
    }
    files.write_json(options.output, found)
    raise SystemExit(kills != equal)


if __name__ == "__main__":
    main()
