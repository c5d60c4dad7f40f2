"""Requests of many users in stacked passes.

A thread takes what is waiting, at most `size` users, and ranks for them in one pass. While it
computes, the next ones gather: under load the passes fill up by themselves, and a lone user does
not wait for others.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from pfm_llm.base.errors import BusyError
from pfm_llm.recommender.serving import Served


@dataclass
class Counts:
    """What a batcher has done since its start.

    Attributes:
        users: Users who were served.
        passes: Passes of the model.
        refused: Users who were turned away because too many waited.
        failed: Users whose pass ended with an error.
    """

    users: int = 0
    passes: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(frozen=True)
class _Waiting:
    served: Served
    weight: float | None
    found: "Future[np.ndarray]" = field(default_factory=Future)


class Batcher:
    """Ranks for users who ask at the same time; any thread may ask.

    Args:
        scores: Scores [U, I] of users in one pass, such as `StackedServing.scores`.
        size: The most users in a pass.
        most_waiting: How many may wait; who comes then is refused.
    """

    def __init__(
        self,
        scores: Callable[[Sequence[Served], float | None], np.ndarray],
        size: int = 64,
        most_waiting: int = 256,
    ) -> None:
        self.counts = Counts()
        self._scores = scores
        self._size = size
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(most_waiting)
        self._closing = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="pfm-passes", daemon=True)
        self._thread.start()

    def submit(self, served: Served, weight: float | None = None) -> "Future[np.ndarray]":
        """The scores [I] of a user, when their pass has ended.

        Args:
            served: The user.
            weight: Factor on the private part; None: as training chose it.

        Raises:
            BusyError: Too many are waiting, or the batcher is closed.
        """
        asked = _Waiting(served, weight)
        with self._closing:
            if self._is_closed:
                raise BusyError("the service is stopping; ask again when it is back")
            try:
                self._waiting.put_nowait(asked)
            except queue.Full:
                self.counts.refused += 1
                raise BusyError(
                    f"{self._waiting.maxsize} users are waiting already; ask again in a moment"
                ) from None
        return asked.found

    @property
    def num_waiting(self) -> int:
        """How many wait now."""
        return self._waiting.qsize()

    def close(self) -> None:
        """Take no more users, and serve all who wait."""
        with self._closing:
            is_first, self._is_closed = not self._is_closed, True
        if is_first:
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, is_last = [first], False
            while len(batch) < self._size and not is_last:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    is_last = True
                else:
                    batch.append(following)
            for weight in dict.fromkeys(one.weight for one in batch):
                self._pass([one for one in batch if one.weight == weight], weight)
            if is_last:
                return

    def _pass(self, batch: list[_Waiting], weight: float | None) -> None:
        self.counts.passes += 1
        try:
            scores = self._scores([one.served for one in batch], weight)
        except Exception as error:
            if len(batch) > 1:  # nobody suffers from another's request
                for one in batch:
                    self._pass([one], weight)
                return
            self.counts.failed += 1
            batch[0].found.set_exception(error)
            return
        self.counts.users += len(batch)
        for one, own in zip(batch, scores, strict=True):
            one.found.set_result(own)
