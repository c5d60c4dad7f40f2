"""A newer shared adapter, which is kept only if it serves the user's own past no worse.

Each of the newest events is taken as a question: what would both adapters have recommended before
it, each with the private part that it reads off the events before? The quality is the
log-probability of the item that the user met, over all items that they had not met by then
(prequential; Dawid 1984). The newer adapter is kept unless its mean is lower by more than the
standard error of the difference. Of fewer than five events nothing can be told, and it is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfm_llm.agent.actions import Event
from pfm_llm.agent.ranking import Ranking
from pfm_llm.base.errors import ConfigError
from pfm_llm.recommender import Recommender

NEWEST = 20
"""How many events are asked."""
LEAST = 5


@dataclass(frozen=True)
class Check:
    """How a newer adapter serves a user's own past.

    Attributes:
        num_events: How many events were asked.
        difference: Mean log-probability of what the user met, newer less older; None: none was
            asked.
        error: Its standard error, or None.
    """

    num_events: int
    difference: float | None
    error: float | None

    @property
    def is_no_worse(self) -> bool:
        """Whether the newer one may be kept."""
        if self.difference is None or self.error is None:
            return True
        return self.difference >= -self.error


def check_fits(model: Recommender) -> None:
    """Check that an agent can serve with a recommender.

    Raises:
        ConfigError: Its private part is trained by steps.
    """
    if not model.serving.fits:
        raise ConfigError(
            "an agent needs a private part that follows from the history, as that of method "
            "pfm or pfm_embedding; this adapter's is trained by steps"
        )


def check(older: Recommender, newer: Recommender, events: Sequence[Event]) -> Check:
    """Ask both for the newest events; both rank the same catalogue."""
    if len(events) < LEAST:
        return Check(0, None, None)
    first = max(1, len(events) - NEWEST)
    old, new = (
        np.array(Ranking(model).log_shares_of_next(events, first)) for model in (older, newer)
    )
    found = new - old
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    return Check(len(found), float(found.mean()), error)
