"""EASE: a linear item-item model in closed form."""

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch

from pfm_llm.baselines.common import Histories, ScoreMatrix, fitted, seen_matrix
from pfm_llm.errors import ConfigError, DataError

MAX_DENSE_ITEMS = 20_000
"""Above this an item-by-item matrix (float64, 3.2 GB) is more than a baseline is worth."""


class Ease:
    """EASE (Steck 2019, arXiv 1905.03375): a linear item-item model in closed form.

    With X the binary user-item matrix and P = (XᵀX + l2 · I)⁻¹, the weights are
    B = I - P · diag(1 / diag P), so that diag B = 0; a history scores the sum of its items' rows
    of B, repeated items once.

    Args:
        l2: Strength of the ridge, above 0.

    Raises:
        ConfigError: ``l2`` is not above 0.
    """

    def __init__(self, l2: float = 200.0) -> None:
        if not l2 > 0:
            raise ConfigError(f"EASE's l2 is {l2}: it must be above 0")
        self._l2 = l2
        self._weights: ScoreMatrix | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The ridge."""
        return {"l2": self._l2}

    def fit(self, histories: Histories, num_items: int) -> Self:
        """See `Baseline.fit`. Time grows with the cube of the catalogue.

        Raises:
            DataError: See `Baseline.fit`; there are more than `MAX_DENSE_ITEMS` items.
        """
        if num_items > MAX_DENSE_ITEMS:
            raise DataError(
                f"EASE needs a dense matrix over all pairs of {num_items} items, more than the "
                f"{MAX_DENSE_ITEMS} it is made for; leave ease out of evaluation.baselines"
            )
        seen = seen_matrix(histories, num_items)
        gram = (seen.T @ seen).toarray().astype(np.float64)
        gram[np.diag_indices(num_items)] += self._l2
        # Positive definite by the ridge, so Cholesky: half the work of a general inverse.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram))).numpy()
        weights = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        self._weights = weights.astype(np.float32)
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`."""
        weights = fitted(self._weights)
        return np.asarray(seen_matrix(histories, len(weights)) @ weights)
