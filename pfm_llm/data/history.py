"""A user's history as a value, and a question about what comes after it."""

import dataclasses
from dataclasses import dataclass

import numpy as np

NO_LABEL = -1
"""In `History.labels`: nobody knows whether the user liked the item."""


@dataclass(frozen=True, eq=False)
class History:
    """The items that one user met, oldest first.

    Attributes:
        items: int [n].
        ratings: float [n], where there are any.
        liked: bool [n], whether the user liked each item, where likes are a task.
    """

    items: np.ndarray
    ratings: np.ndarray | None = None
    liked: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> "History":
        """A stretch of the history."""
        ratings, liked = (None if v is None else v[part] for v in (self.ratings, self.liked))
        return History(self.items[part], ratings, liked)

    @property
    def labels(self) -> np.ndarray:
        """int8 [n]: 1 liked, 0 not liked, or `NO_LABEL`."""
        if self.liked is None:
            return np.full(len(self), NO_LABEL, np.int8)
        return self.liked.astype(np.int8)

    def labelled(self, threshold: float | None) -> "History":
        """The same with ``liked`` set where ratings tell; None: likes are no task.

        Args:
            threshold: Ratings from here on count as liked.
        """
        if threshold is None or self.ratings is None:
            return self
        return dataclasses.replace(self, liked=self.ratings >= threshold)


@dataclass(frozen=True, eq=False)
class Query:
    """Which items come after a history?

    Attributes:
        user: Internal id.
        history: What a method may see.
        targets: int [m], the items to find, none of them in the history.
        liked: bool [m], whether the user liked each target; None: not asked.
    """

    user: int
    history: History
    targets: np.ndarray
    liked: np.ndarray | None = None
