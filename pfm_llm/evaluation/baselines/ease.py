"""EASE: a linear item-item model in closed form."""

from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, fitted, seen_matrix

MAX_DENSE = 20_000
"""The largest side of a square matrix (float64, 3.2 GB at this size)."""

_Scores = Callable[[sparse.csr_array], npt.NDArray[np.floating]]


def check_size(num_users: int, num_items: int) -> None:
    """Check that the dense matrix of EASE is not too large.

    Raises:
        DataError: There are more than `MAX_DENSE` items and users.
    """
    if min(num_items, num_users) > MAX_DENSE:
        raise DataError(
            f"EASE needs a dense matrix over all pairs of {num_items} items or of {num_users} "
            f"users, more than the {MAX_DENSE} it is made for; leave ease out of "
            "evaluation.baselines"
        )


class Ease:
    """EASE (Steck 2019, arXiv 1905.03375): a linear item-item model in closed form.

    With X the binary user-item matrix and P = (XᵀX + l2 · I)⁻¹, the weights are
    B = I - P · diag(1 / diag P), so that diag B = 0; a history scores the sum of its items' rows
    of B, repeated items once.

    With fewer users than items, P is not computed. Woodbury's identity replaces it:
    P = (I - Xᵀ (XXᵀ + l2 · I)⁻¹ X) / l2.

    Args:
        l2: Strength of the ridge, above 0.

    Raises:
        ConfigError: ``l2`` is not above 0.
    """

    def __init__(self, l2: float = 200.0) -> None:
        if not l2 > 0:
            raise ConfigError(f"EASE's l2 is {l2}: it must be above 0")
        self._l2 = l2
        self._num_items = 0
        self._scores: _Scores | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The ridge."""
        return {"l2": self._l2}

    def fit(self, histories: Histories, num_items: int) -> Self:
        """See `Baseline.fit`. Time grows with the cube of min(number of items, number of users).

        Raises:
            DataError: See `Baseline.fit`; there are more than `MAX_DENSE` items and users.
        """
        check_size(len(histories), num_items)
        seen = seen_matrix(histories, num_items)
        by = _by_users if len(histories) < num_items else _by_items
        self._num_items, self._scores = num_items, by(seen, self._l2)
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`."""
        scores = fitted(self._scores)
        return scores(seen_matrix(histories, self._num_items)).astype(np.float32)


def _by_items(seen: sparse.csr_array, l2: float) -> _Scores:
    inverse = _ridge_inverse(seen.T @ seen, l2)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    narrow = weights.astype(np.float32)
    return lambda asked: asked @ narrow


def _by_users(seen: sparse.csr_array, l2: float) -> _Scores:
    projected = _ridge_inverse(seen @ seen.T, l2) @ seen  # [U, I]
    left = 1 - np.asarray(seen.multiply(projected).sum(axis=0))  # l2 · diag P

    def scores(asked: sparse.csr_array) -> npt.NDArray[np.floating]:
        whole = asked.toarray().astype(np.float64)
        return whole - (whole - (asked @ seen.T).toarray() @ projected) / left

    return scores


def _ridge_inverse(gram: sparse.csr_array, l2: float) -> npt.NDArray[np.float64]:
    """(G + l2 · I)⁻¹, by Cholesky: the ridge makes the matrix positive definite."""
    dense = gram.toarray().astype(np.float64)
    dense[np.diag_indices(len(dense))] += l2
    found: npt.NDArray[np.float64]
    found = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(dense))).numpy()
    return found
