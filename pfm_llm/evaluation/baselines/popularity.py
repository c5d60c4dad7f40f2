"""Popularity: the number of training interactions of an item."""

from collections.abc import Mapping
from typing import Self

import numpy as np

from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, fitted, flatten


class Popularity:
    """Every item scores the number of its training interactions."""

    def __init__(self) -> None:
        self._counts: ScoreMatrix | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """None."""
        return {}

    def fit(self, histories: Histories, num_items: int) -> Self:
        """See `Baseline.fit`."""
        items, _ = flatten(histories, num_items)
        self._counts = np.bincount(items, minlength=num_items).astype(np.float32)
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`; equal for all histories."""
        return np.tile(fitted(self._counts), (len(histories), 1))
