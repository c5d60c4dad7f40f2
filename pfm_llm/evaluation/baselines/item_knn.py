"""ItemKNN: the items most similar to those of the history."""

from collections.abc import Mapping
from typing import Self

import numpy as np
from scipy import sparse

from pfm_llm.base.errors import ConfigError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, fitted, seen_matrix


class ItemKnn:
    """Item-based nearest neighbours (Sarwar et al. 2001, doi 10.1145/371920.372071).

    With n(i, j) the number of users who have both items, the similarity is the cosine of the binary
    user-item matrix's columns, shrunk for pairs with few common users:
    s(i, j) = n(i, j) / (√(n(i, i) · n(j, j)) + shrinkage). A candidate j scores the sum of s(i, j)
    over the items i of the history that are among its ``neighbours`` nearest. Repeated items count
    once. Items that tie with the last neighbour all count, so the order of ids does not matter.

    Args:
        neighbours: Number of neighbours per item, at least 1.
        shrinkage: Added to the denominator, in users, at least 0.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(self, neighbours: int = 20, shrinkage: float = 0.0) -> None:
        if not (neighbours >= 1 and shrinkage >= 0):
            raise ConfigError(
                f"ItemKNN: neighbours is {neighbours} and must be at least 1, shrinkage is "
                f"{shrinkage} and must be at least 0"
            )
        self._neighbours = neighbours
        self._shrinkage = shrinkage
        self._similarity: sparse.csr_array | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The constructor's arguments."""
        return {"neighbours": self._neighbours, "shrinkage": self._shrinkage}

    def fit(self, histories: Histories, num_items: int) -> Self:
        """See `Baseline.fit`. Memory grows with the number of distinct pairs."""
        seen = seen_matrix(histories, num_items)
        together = (seen.T @ seen).tocoo()
        norms = np.sqrt(seen.sum(axis=0))
        rows, columns = together.coords
        similarity = together.data / (norms[rows] * norms[columns] + self._shrinkage)
        apart = rows != columns
        alike = sparse.coo_array(
            (similarity[apart].astype(np.float32), (rows[apart], columns[apart])), together.shape
        ).tocsc()
        _keep_largest(alike, self._neighbours)
        self._similarity = alike.tocsr()
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`."""
        similarity = fitted(self._similarity)
        return (seen_matrix(histories, similarity.shape[0]) @ similarity).toarray()


def _keep_largest(matrix: sparse.csc_array, count: int) -> None:
    """Keep the ``count`` largest entries of each column, and the entries that tie with the last."""
    for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        column = matrix.data[start:end]
        if len(column) > count:
            column[column < np.partition(column, -count)[-count]] = 0
    matrix.eliminate_zeros()
