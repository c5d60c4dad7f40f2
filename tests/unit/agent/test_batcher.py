"""Requests of many users: together in a pass, apart in what they get, and bounded."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pfm_llm.agent.host.batcher import Batcher
from pfm_llm.base.errors import BusyError, DataError
from pfm_llm.data.history import History
from pfm_llm.recommender.serving import Served


def _user(number: int) -> Served:
    return Served(History(np.array([number])))


class _Model:
    """Gives each user their own number; it waits until it is told to go on."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.passes: list[tuple[int, float | None]] = []

    def __call__(self, users: Sequence[Served], weight: float | None) -> np.ndarray:
        self.begun.set()
        self.go.wait(10)
        self.passes.append((len(users), weight))
        numbers = [int(user.history.items[0]) for user in users]
        if 13 in numbers:
            raise DataError("unlucky")
        return np.array(numbers, np.float32)[:, None]


@pytest.fixture
def model() -> Iterator[_Model]:
    model = _Model()
    yield model
    model.go.set()


def test_who_comes_during_a_pass_is_in_the_next_one_together(model: _Model) -> None:
    batcher = Batcher(model, size=4)
    first = batcher.submit(_user(0))
    assert model.begun.wait(10)
    others = [batcher.submit(_user(number)) for number in range(1, 7)]
    assert batcher.num_waiting == 6
    model.go.set()
    assert [float(one.result(10)[0]) for one in (first, *others)] == list(range(7))
    assert [size for size, _ in model.passes] == [1, 4, 2]
    assert (batcher.counts.users, batcher.counts.passes) == (7, 3)
    batcher.close()


def test_users_with_other_weights_are_served_in_passes_of_their_own(model: _Model) -> None:
    batcher = Batcher(model)
    batcher.submit(_user(0))
    assert model.begun.wait(10)
    found = [batcher.submit(_user(n), weight) for n, weight in enumerate((0.0, None, 0.0))]
    model.go.set()
    assert [float(one.result(10)[0]) for one in found] == [0, 1, 2]
    assert sorted(model.passes[1:], key=str) == [(1, None), (2, 0.0)]
    batcher.close()


def test_who_comes_when_too_many_wait_is_refused(model: _Model) -> None:
    batcher = Batcher(model, most_waiting=2)
    batcher.submit(_user(0))
    assert model.begun.wait(10)
    kept = [batcher.submit(_user(number)) for number in (1, 2)]
    with pytest.raises(BusyError, match="2 users are waiting"):
        batcher.submit(_user(3))
    assert batcher.counts.refused == 1
    model.go.set()
    assert [float(one.result(10)[0]) for one in kept] == [1, 2]
    batcher.close()


def test_an_error_reaches_the_user_who_causes_it_alone(model: _Model) -> None:
    batcher = Batcher(model)
    batcher.submit(_user(0))
    assert model.begun.wait(10)
    unlucky, beside = batcher.submit(_user(13)), batcher.submit(_user(2))
    model.go.set()
    with pytest.raises(DataError, match="unlucky"):
        unlucky.result(10)
    assert float(beside.result(10)[0]) == 2
    assert float(batcher.submit(_user(3)).result(10)[0]) == 3
    assert (batcher.counts.failed, batcher.counts.users) == (1, 3)
    batcher.close()


def test_closing_serves_who_waits_and_refuses_who_comes(model: _Model) -> None:
    batcher = Batcher(model, most_waiting=3)
    batcher.submit(_user(0))
    assert model.begun.wait(10)
    kept = [batcher.submit(_user(number)) for number in (1, 2, 3)]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(batcher.close)
        model.go.set()
        closing.result(10)
    assert [float(one.result(0)[0]) for one in kept] == [1, 2, 3]
    with pytest.raises(BusyError, match="stopping"):
        batcher.submit(_user(4))
    batcher.close()
