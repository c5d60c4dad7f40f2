"""The progress of a suite, and an estimate of its remaining time from mean durations."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from pfm_llm.suite.plan import Point, SuiteRun
from pfm_llm.suite.records import Record, read_record
from pfm_llm.suite.status import is_recorded


class Pace:
    """Counts the experiments and final evaluations that remain.

    Args:
        runs: All runs of the plan.
        left: The runs without a result.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, runs: Sequence[SuiteRun], left: Sequence[SuiteRun], clock: Callable[[], float]
    ) -> None:
        self.now = clock
        self._started = clock()
        self._seconds: list[float] = []
        self._evaluation_seconds: list[float] = []
        self._total = sum(len(run.points) for run in runs)
        self._missing = {point.config.name for run in left for point in run.points}
        self._unevaluated = {run.label for run in left if run.script is None}
        for point in (point for run in left for point in run.points if is_recorded(point)):
            self._count(point, read_record(point))

    def trained(self, point: Point, record: Record, what: str) -> str:
        """Count an experiment that has just finished, and return the line of the log.

        Args:
            point: The experiment.
            record: Its record.
            what: The result, in words.
        """
        self._count(point, record)
        done = self._total - len(self._missing)
        times = [f"{tqdm.format_interval(self.now() - self._started)} elapsed"]
        if not self._missing or self._seconds:
            times.append(f"about {tqdm.format_interval(self._seconds_left())} left")
        return f"[{done}/{self._total}] {point.config.name}: {what}; {', '.join(times)}"

    def gave_up(self, run: SuiteRun) -> None:
        """Count a failed run as finished."""
        self._missing -= {point.config.name for point in run.points}
        self._unevaluated.discard(run.label)

    @contextlib.contextmanager
    def evaluating(self, run: SuiteRun) -> Iterator[None]:
        """Time a final evaluation."""
        started = self.now()
        yield
        self._evaluation_seconds.append(self.now() - started)
        self._unevaluated.discard(run.label)

    def _count(self, point: Point, record: Record) -> None:
        self._missing.discard(point.config.name)
        if record.seconds is not None:
            self._seconds.append(record.seconds)

    def _seconds_left(self) -> float:
        """The estimate; an activity that has not been timed yet counts as nothing."""
        activities = (
            (self._missing, self._seconds),
            (self._unevaluated, self._evaluation_seconds),
        )
        return sum(len(left) * statistics.fmean(times) for left, times in activities if times)
