"""The progress of a suite, with an estimate of the remaining time from the mean so far."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from pfm_llm.suite.plan import Point, SuiteRun
from pfm_llm.suite.records import Record, read_record
from pfm_llm.suite.status import is_recorded


class Pace:
    """Counts experiments and final evaluations.

    Args:
        runs: All of the plan's.
        done: Per run, whether its result is there.
        clock: Seconds that only grow.
    """

    def __init__(
        self, runs: Sequence[SuiteRun], done: Sequence[bool], clock: Callable[[], float]
    ) -> None:
        self.now = clock
        self._started = clock()
        self._seconds: list[float] = []
        self._evaluation_seconds: list[float] = []
        left = [run for run, is_done in zip(runs, done, strict=True) if not is_done]
        trained = [point for run in left for point in run.points if is_recorded(point)]
        for point in trained:
            self._remember(read_record(point))
        self._total = sum(len(run.points) for run in runs)
        self._missing = {p.config.name for run in left for p in run.points} - {
            point.config.name for point in trained
        }
        self._unevaluated = {run.label for run in left if run.script is None}

    def trained(self, point: Point, record: Record, what: str) -> str:
        """The line for an experiment that was just finished.

        Args:
            point: Which.
            record: What it left.
            what: What there is to say about it.
        """
        self._missing.discard(point.config.name)
        self._remember(record)
        done = self._total - len(self._missing)
        times = [f"{tqdm.format_interval(self.now() - self._started)} elapsed"]
        left = self._seconds_left()
        if left is not None:
            times.append(f"about {tqdm.format_interval(left)} left")
        return f"[{done}/{self._total}] {point.config.name}: {what}; {', '.join(times)}"

    def gave_up(self, run: SuiteRun) -> None:
        """Nothing more comes of a run."""
        self._missing -= {point.config.name for point in run.points}
        self._unevaluated.discard(run.label)

    @contextlib.contextmanager
    def evaluating(self, run: SuiteRun) -> Iterator[None]:
        """Time a final evaluation."""
        started = self.now()
        yield
        self._evaluation_seconds.append(self.now() - started)
        self._unevaluated.discard(run.label)

    def _remember(self, record: Record) -> None:
        if record.seconds is not None:
            self._seconds.append(record.seconds)

    def _seconds_left(self) -> float | None:
        """None as long as nothing was finished that could be a measure."""
        left = 0.0
        for count, seconds in (
            (len(self._missing), self._seconds),
            (len(self._unevaluated), self._evaluation_seconds),
        ):
            if count and seconds:
                left += count * sum(seconds) / len(seconds)
            elif count and seconds is self._seconds:
                return None
        return left
