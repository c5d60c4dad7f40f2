"""A lock that threads get in the order in which they asked for it."""

import threading


class Turns:
    """One thread at a time, first come, first served.

    `threading.Lock` may give the lock back to the thread that has just left it. A thread of many
    short steps would then keep all others waiting until its last one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = 0
        self._serving = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._serving == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._serving += 1
            self._changed.notify_all()
