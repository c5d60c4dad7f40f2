"""A recommender whose users are served in passes with others who ask at the same time."""

import copy
from collections.abc import Sequence

import numpy as np

from pfm_llm.agent.host.batcher import Batcher
from pfm_llm.recommender import Recommender
from pfm_llm.recommender.serving import Served, StackedServing


class SharedPasses(StackedServing):
    """A `StackedServing` whose users join the passes of all callers.

    Args:
        serving: Ranks for a pass.
        batcher: Gathers the users of a pass.
    """

    def __init__(self, serving: StackedServing, batcher: Batcher) -> None:
        super().__init__(serving.parts, serving.trained)
        self._batcher = batcher

    def scores(
        self,
        users: Sequence[Served],
        weight: float | None = None,
        candidates: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `StackedServing.scores`.

        Raises:
            BusyError: Too many users are waiting.
        """
        asked = [self._batcher.submit(user, weight) for user in users]
        found = np.stack([one.result() for one in asked])
        return found if candidates is None else found[:, candidates]


def hosted(model: Recommender, batcher: Batcher) -> Recommender:
    """The same recommender, in shared passes."""
    found = copy.copy(model)
    found.serving = SharedPasses(model.serving, batcher)
    return found
