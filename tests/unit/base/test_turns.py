"""Turns are given in the order in which they were asked for."""

import threading

from pfm_llm.base.turns import Turns


def test_a_thread_of_many_steps_lets_others_between_them() -> None:
    turns, order = Turns(), []
    waiting = threading.Event()

    def once() -> None:
        waiting.set()
        with turns:
            order.append("once")

    with turns:
        other = threading.Thread(target=once)
        other.start()
        waiting.wait()
        while turns._given < 2:  # it has asked, and waits
            threading.Event().wait(0.001)
    with turns:
        order.append("again")
    other.join()
    assert order == ["once", "again"]


def test_one_thread_at_a_time_and_an_error_ends_a_turn() -> None:
    turns, inside, seen = Turns(), [], []

    def work() -> None:
        for _ in range(50):
            try:
                with turns:
                    inside.append(1)
                    seen.append(len(inside))
                    inside.pop()
                    raise ValueError
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 200
