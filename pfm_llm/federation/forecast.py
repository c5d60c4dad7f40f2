"""The time that the remaining rounds will take, with the first pass over the clients apart.

In a client's first round the trunk of the language model reads the client's windows. Its states are
cached, so that later rounds take a fraction of the time. The mean of all rounds so far would
promise far too much time.
"""


class Forecast:
    """Forecasts the remaining rounds of a run from those that it has done since it started.

    Args:
        first_round: The first round to run, from 1.
        last_round: The last one.
        num_clients: The clients of the federation; each takes part once before one does twice.
        cohort_size: Clients in a round.
    """

    def __init__(
        self, first_round: int, last_round: int, num_clients: int, cohort_size: int
    ) -> None:
        self._left = [
            min(cohort_size, max(0, num_clients - (number - 1) * cohort_size))
            for number in range(first_round, last_round + 1)
        ]
        self._num_rounds = self._num_new = 0
        self._steady_seconds = self._first_seconds = 0.0

    def add(self, seconds: float, trunk_seconds: float = 0.0) -> float:
        """Count the next round as done.

        Args:
            seconds: The duration of the round.
            trunk_seconds: The part of it that the trunk took.

        Returns:
            Seconds that the remaining rounds will take.
        """
        num_new = self._left.pop(0)
        first = trunk_seconds if num_new else 0.0
        self._num_rounds += 1
        self._num_new += num_new
        self._first_seconds += first
        self._steady_seconds += seconds - first
        steady = self._steady_seconds / self._num_rounds * len(self._left)
        return steady + self._first_seconds / max(self._num_new, 1) * sum(self._left)
