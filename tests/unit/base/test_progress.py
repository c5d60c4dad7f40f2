"""A live bar on a terminal, sparse log lines elsewhere, silence on other processes."""

import io
import logging
from types import SimpleNamespace

import pytest

from pfm_llm.base.progress import Progress


class FakeClock:
    """Seconds that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self) -> bool:
        """Always."""
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    stream = Terminal()
    _use(stream, monkeypatch)
    return stream


@pytest.fixture
def pipe(monkeypatch, caplog) -> io.StringIO:
    """A standard error that is no terminal, with INFO lines captured."""
    caplog.set_level(logging.INFO, logger="pfm_llm.base.progress")
    stream = io.StringIO()
    _use(stream, monkeypatch)
    return stream


def _use(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not on ``sys`` itself: pytest puts its own stream there between set-up and call.
    monkeypatch.setattr("pfm_llm.base.progress.sys", SimpleNamespace(stderr=stream))


def test_on_a_terminal_one_bar_shows_count_rate_time_left_and_figures(terminal) -> None:
    with Progress(4, "training") as progress:
        for loss in (7.0, 6.5, 6.123456, 6.0):
            progress.update(1, loss=loss, round=2)
    last = terminal.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert last.startswith("training 100%|")
    assert "4/4 [" in last
    assert "clients/s" in last
    assert "loss=6, round=2" in last


def test_on_a_terminal_nothing_is_logged(terminal, caplog) -> None:
    caplog.set_level(logging.INFO, logger="pfm_llm.base.progress")
    with Progress(1, "training") as progress:
        progress.update()
    assert caplog.messages == []


def test_resumed_work_starts_where_it_stopped(terminal) -> None:
    with Progress(10, "training", initial=6) as progress:
        progress.update(4)
    first = terminal.getvalue().strip("\r").split("\r")[0]
    assert " 6/10 " in first
    assert "10/10" in terminal.getvalue()
    assert progress.count == 10


@pytest.mark.parametrize("stream", ["terminal", "pipe"])
def test_not_enabled_is_silent_everywhere(stream, request, caplog) -> None:
    shown = request.getfixturevalue(stream)
    with Progress(3, "training", enabled=False) as progress:
        progress.update(3, loss=1.0)
    assert shown.getvalue() == ""
    assert caplog.messages == []
    assert progress.count == 3


def test_without_a_terminal_there_is_no_bar_but_a_line_each_tenth(pipe, clock, caplog) -> None:
    with Progress(100, "training", clock=clock) as progress:
        for _ in range(100):
            clock.now += 1.0  # a tenth takes 10 s: above the 5 s that lines keep apart
            progress.update(loss=6.5)
    assert pipe.getvalue() == ""
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == "training: 10/100, 1 clients/s, 01:30 left, loss=6.5"
    assert caplog.messages[-1] == "training: 100/100, 1 clients/s, loss=6.5"


def test_fast_work_is_not_logged_more_often_than_every_5_s(pipe, clock, caplog) -> None:
    with Progress(100, "training", clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.125  # 12.5 s in all: lines at 5 s, 10 s, and the end
            progress.update()
    assert [message.split(",")[0] for message in caplog.messages] == [
        "training: 40/100",
        "training: 80/100",
        "training: 100/100",
    ]


def test_slow_work_is_logged_at_least_every_minute(pipe, clock, caplog) -> None:
    with Progress(1000, "training", clock=clock) as progress:
        for _ in range(4):
            clock.now += 30.0  # 4 of 1000 are far from a tenth
            progress.update()
    assert [message.split(",")[0] for message in caplog.messages] == [
        "training: 2/1000",
        "training: 4/1000",
    ]


def test_rate_and_time_left_count_only_the_work_of_this_run(pipe, clock, caplog) -> None:
    with Progress(100, "training", initial=80, clock=clock, unit="users") as progress:
        clock.now += 5.0
        progress.update(10)
    # 10 users in 5 s are 2 a second: the other 10 take 5 s.
    assert caplog.messages == ["training: 90/100, 2 users/s, 00:05 left"]


def test_work_that_fails_still_says_how_far_it_came(pipe, clock, caplog) -> None:
    with pytest.raises(RuntimeError), Progress(10, "training", clock=clock) as progress:  # noqa: PT012
        clock.now += 1.0
        progress.update(3)
        raise RuntimeError
    assert caplog.messages == ["training: 3/10, 3 clients/s, 00:02 left"]


@pytest.mark.parametrize("stream", ["terminal", "pipe"])
def test_nothing_to_do_is_no_crash(stream, request, caplog) -> None:
    request.getfixturevalue(stream)
    with Progress(0, "training") as progress:
        progress.update(0)
    assert progress.count == 0
    assert caplog.messages == []


def test_a_process_without_standard_error_logs(monkeypatch, clock, caplog) -> None:
    caplog.set_level(logging.INFO, logger="pfm_llm.base.progress")
    _use(None, monkeypatch)
    with Progress(1, "training", clock=clock) as progress:
        clock.now += 1.0
        progress.update()
    assert caplog.messages == ["training: 1/1, 1 clients/s"]
