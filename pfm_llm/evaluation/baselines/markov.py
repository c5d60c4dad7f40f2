"""A Markov chain over items that uses the whole history; newer items have more weight."""

from collections.abc import Mapping
from typing import Self

import numpy as np
from scipy import sparse

from pfm_llm.base.errors import ConfigError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, fitted, flatten

_NEGLIGIBLE_WEIGHT = 1e-3


class MarkovRecency:
    """A Markov chain over items, averaged over the whole history with decaying weights.

    Training counts each pair "j came d items after i in one history", d up to ``window``, with
    weight ``distance_decay ** (d - 1)``. A row of counts becomes a distribution by Dirichlet
    smoothing with the items' popularity p: P(j|i) = (count(i, j) + smoothing · p(j)) /
    (Σ count(i, ·) + smoothing), so that rare items fall back on popularity. A history scores
    Σ ``decay ** age`` · P(j | item of that age), the newest item having age 0, while the weight
    is at least 0.001; an empty history scores p.

    Args:
        decay: Weight of an item relative to the one after it in the scored history, in (0, 1].
        distance_decay: Weight of a pair relative to one that is a step closer, in (0, 1].
        window: Largest distance of a counted pair, at least 1.
        smoothing: Pseudo-counts added to each row, above 0.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        decay: float = 0.8,
        distance_decay: float = 0.7,
        window: int = 5,
        smoothing: float = 10.0,
    ) -> None:
        if not (0 < decay <= 1 and 0 < distance_decay <= 1 and window >= 1 and smoothing > 0):
            raise ConfigError(
                f"Markov baseline: decay {decay} and distance_decay {distance_decay} must be in "
                f"(0, 1], window {window} at least 1, smoothing {smoothing} above 0"
            )
        self._decay = decay
        self._distance_decay = distance_decay
        self._window = window
        self._smoothing = smoothing
        self._shares: sparse.csr_array | None = None
        self._popularity = self._prior_shares = np.zeros(0)

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The constructor's arguments."""
        return {
            "decay": self._decay,
            "distance_decay": self._distance_decay,
            "window": self._window,
            "smoothing": self._smoothing,
        }

    def fit(self, histories: Histories, num_items: int) -> Self:
        """See `Baseline.fit`. Memory grows with the number of distinct pairs."""
        items, users = flatten(histories, num_items)
        counts = sparse.csr_array((num_items, num_items), dtype=np.float64)
        for distance in range(1, self._window + 1):
            together = users[:-distance] == users[distance:]
            pairs = (items[:-distance][together], items[distance:][together])
            weights = np.full(len(pairs[0]), self._distance_decay ** (distance - 1))
            counts += sparse.coo_array((weights, pairs), counts.shape).tocsr()
        scale = 1.0 / (counts.sum(axis=1) + self._smoothing)
        self._shares = counts.multiply(scale[:, None]).tocsr()
        self._prior_shares = self._smoothing * scale
        self._popularity = np.bincount(items, minlength=num_items) / max(len(items), 1)
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`."""
        shares = fitted(self._shares)
        items, users = flatten(histories, shares.shape[0])
        lengths = np.array([len(history) for history in histories], np.int64)
        ages = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(items))
        recency = np.power(self._decay, ages, dtype=np.float64)
        kept = recency >= _NEGLIGIBLE_WEIGHT
        weights = sparse.coo_array(
            (recency[kept], (users[kept], items[kept])), (len(histories), shares.shape[0])
        ).tocsr()
        prior = weights @ self._prior_shares
        prior[lengths == 0] = 1.0
        scores = (weights @ shares).toarray() + prior[:, None] * self._popularity
        return scores.astype(np.float32)
