"""One live progress bar on a terminal; a few log lines where there is none."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_LOG_EVERY_FRACTION = 0.1
_LOG_AT_LEAST_EVERY_S = 60.0
_LOG_AT_MOST_EVERY_S = 5.0
# rate_noinv: always things per second, never seconds per thing.
_BAR_FORMAT = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_noinv_fmt}{postfix}]"
)


class Progress:
    """Progress through a known number of things, such as clients; the main process shows it.

    On a terminal it is one bar on standard error with count, rate, time left and the figures given
    to `update`. Elsewhere it is INFO log lines: one for each tenth of the way but not more often
    than every 5 s, at least one a minute, and one at the end.

    Example:
        >>> with Progress(3, "reading histories", enabled=False, unit="users") as progress:
        ...     for _ in range(3):
        ...         progress.update()
    """

    def __init__(
        self,
        total: int,
        description: str,
        enabled: bool = True,
        *,
        unit: str = "clients",
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the bar; it appears on entering the context.

        Args:
            total: The number of things; 0 is allowed.
            description: The activity, such as ``"reading histories"``.
            enabled: Whether to show anything: true on the main process alone.
            unit: The name of the things, in the plural.
            initial: The number of things done before, by the run that this one resumes.
            clock: Seconds that only grow.
        """
        self.total = total
        self.count = initial
        self._description = description
        self._enabled = enabled
        self._unit = unit
        self._initial = initial
        self._clock = clock
        self._bar: tqdm | None = None
        self._figures: dict[str, str] = {}
        self._seconds_left: float | None = None
        self._started = self._logged = clock()
        self._logged_count = initial

    def __enter__(self) -> Self:
        self._started = self._logged = self._clock()
        if self._enabled and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                desc=self._description,
                initial=self._initial,
                unit=f" {self._unit}",
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._logged_count != self.count:
            self._log()

    def update(self, n: int = 1, seconds_left: float | None = None, **figures: float | str) -> None:
        """Count ``n`` more things as done.

        Args:
            n: The number of things.
            seconds_left: Forecast for the other things; None: as long each as those so far.
            figures: Shown beside the count until given anew, such as ``loss=6.1``.
        """
        self.count += n
        self._seconds_left = seconds_left
        if not self._enabled:
            return
        self._figures |= {name: _format(value) for name, value in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix_str(
                ", ".join(filter(None, [self._time_left(), *self._figures_list()])), False
            )
            self._bar.update(n)
        elif self._is_log_due():
            self._log()

    def _is_log_due(self) -> bool:
        silence = self._clock() - self._logged
        if silence < _LOG_AT_MOST_EVERY_S:
            return False
        advance = self.count - self._logged_count
        return advance >= _LOG_EVERY_FRACTION * self.total or silence >= _LOG_AT_LEAST_EVERY_S

    def _log(self) -> None:
        now = self._clock()
        self._logged, self._logged_count = now, self.count
        parts = [f"{self._rate():.3g} {self._unit}/s", self._time_left(), *self._figures_list()]
        text = ", ".join(filter(None, parts))
        _LOG.info("%s: %d/%d, %s", self._description, self.count, self.total, text)

    def _rate(self) -> float:
        return (self.count - self._initial) / max(self._clock() - self._started, 1e-9)

    def _time_left(self) -> str:
        """Such as ``03:12 left``; empty at the end, and before anything is known."""
        left, rate = max(self.total - self.count, 0), self._rate()
        seconds = self._seconds_left
        if seconds is None and rate > 0:
            seconds = left / rate
        return f"{tqdm.format_interval(seconds)} left" if left and seconds is not None else ""

    def _figures_list(self) -> list[str]:
        return [f"{name}={value}" for name, value in self._figures.items()]


def _format(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
