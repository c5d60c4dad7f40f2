"""The interface of the central baselines, and histories as arrays."""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pfm_llm.base.errors import DataError, TrainingError
from pfm_llm.evaluation.scoring import check_ids

Histories = Sequence[npt.NDArray[np.integer]]
ScoreMatrix = npt.NDArray[np.float32]
_Parameters = TypeVar("_Parameters")


class Scorer(Protocol):
    """A fitted baseline."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The settings of the fit."""

    def score(self, histories: Histories) -> ScoreMatrix:
        """Score every item as the next one.

        Args:
            histories: Per query the item ids in order of time; a history may be empty.

        Returns:
            float32 [queries, num_items], higher is better; seen items are not masked.

        Raises:
            DataError: An id is outside the catalogue.
            TrainingError: The baseline was not fitted.
        """


class Baseline(Scorer, Protocol):
    """A scorer that is fitted on histories."""

    def fit(self, histories: Histories, num_items: int) -> Self:
        """Fit on training histories and return itself.

        Args:
            histories: Per user the item ids in order of time, each in [0, num_items).
            num_items: Size of the catalogue.

        Raises:
            DataError: The catalogue is empty, too large, or an id is outside of it.
        """


def flatten(
    histories: Histories, num_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All items one after another, and the history of each.

    Args:
        histories: Per query the item ids.
        num_items: Size of the catalogue.

    Returns:
        Items and indices of histories, each int64 [events].

    Raises:
        DataError: The catalogue is empty, or an id is outside of it.
    """
    if num_items < 1:
        raise DataError("the catalogue has no items: a baseline needs at least one")
    items = np.concatenate([np.zeros(0, np.int64), *histories]).astype(np.int64)
    check_ids(items, num_items, "history")
    lengths = np.array([len(history) for history in histories], np.int64)
    return items, np.repeat(np.arange(len(histories)), lengths)


def seen_matrix(histories: Histories, num_items: int) -> sparse.csr_array:
    """1 for each item in each history, else 0; float32 [histories, num_items].

    Raises:
        DataError: See `flatten`.
    """
    items, users = flatten(histories, num_items)
    ones = np.ones(len(items), np.float32)
    matrix = sparse.coo_array((ones, (users, items)), (len(histories), num_items)).tocsr()
    matrix.data[:] = 1.0  # repeated items were summed
    return matrix


def fitted(parameters: _Parameters | None) -> _Parameters:
    """The parameters of a fitted baseline.

    Raises:
        TrainingError: They are None.
    """
    if parameters is None:
        raise TrainingError("score() before fit(): call fit(histories, num_items) first")
    return parameters
