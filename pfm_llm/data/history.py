"""A user's history, and a query for the items that follow it."""

import dataclasses
from dataclasses import dataclass

import numpy as np

NO_LABEL = -1
"""In `History.labels`: it is unknown whether the user liked the item."""


@dataclass(frozen=True, eq=False)
class History:
    """The items of one user's past interactions, oldest first.

    Attributes:
        items: int [n].
        ratings: float [n]; None without ratings.
        liked: bool [n], whether the user liked each item; None if likes are not predicted.
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
        """The same history with ``liked`` derived from the ratings.

        Args:
            threshold: A rating of at least this is a like; None: likes are not predicted.
        """
        if threshold is None or self.ratings is None:
            return self
        return dataclasses.replace(self, liked=self.ratings >= threshold)


@dataclass(frozen=True, eq=False)
class Query:
    """A question to a method: which items follow this history?

    Attributes:
        user: Internal id.
        history: The items that a method may use.
        targets: int [m], the items to find, none of them in the history.
        liked: bool [m], whether the user liked each target; None: likes are not predicted.
    """

    user: int
    history: History
    targets: np.ndarray
    liked: np.ndarray | None = None
