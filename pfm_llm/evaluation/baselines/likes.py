"""Baselines of the task ``like``: whether a user will like an item that the user has rated.

Both are central, fitted on train and chosen on validation by the mean AUC per user. The AUC only
depends on the order of a user's own held-out items, so a constant per user does not matter.

- ``like_rate`` scores an item with L likes among n ratings (L + c · p) / (n + c), the same for
  everybody; p is the share of likes among all ratings and c the damping, in ratings.
- ``like_ridge`` adds a ridge regression of each user's own on item features: user u's score of
  item i is r(i) + w_u · x(i), with r the like rate and x the features, centred over the catalogue
  and scaled so that the mean of |x|² is 1. With y = 1 for a like, and r₋ᵤ the rates without the
  user's own ratings (else they would explain themselves),

      w_u, b_u = argmin Σ_i (y_i - r₋ᵤ(i) - b - w · x(i))² + l2 · |w|²

  over the user's training items.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import HeldOut, Split
from pfm_llm.evaluation.metrics import FloatArray, per_user_auc

LIKE_RATE, LIKE_RIDGE = "like_rate", "like_ridge"
DAMPINGS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class FittedLikes:
    """A fitted baseline of likes.

    Attributes:
        name: ``like_rate`` or ``like_ridge``.
        hyperparameters: The values that were chosen on validation.
        validation_auc: Mean AUC per user on validation. It is NaN if no user there has both
            classes; the first values of the grid are then kept.
    """

    name: str
    hyperparameters: Mapping[str, float]
    validation_auc: float
    _rates: FloatArray = field(repr=False)
    _features: FloatArray = field(repr=False)
    _weights: FloatArray = field(repr=False)

    def aucs(self, held_out: HeldOut, liked: tuple[npt.NDArray[np.bool_], ...]) -> FloatArray:
        """`metrics.per_user_auc` of each query's targets, float64 [queries].

        Args:
            held_out: The queries.
            liked: Per query whether each target was liked.
        """
        scores = [
            self._rates[items] + self._features[items] @ self._weights[user]
            for user, items in zip(held_out.users, held_out.targets, strict=True)
        ]
        return per_user_auc(scores, liked)


def num_like_settings() -> dict[str, int]:
    """Name of each baseline of likes to the number of settings that validation chooses among."""
    return {LIKE_RATE: len(DAMPINGS), LIKE_RIDGE: len(DAMPINGS) + len(RIDGES)}


def fit_like_baselines(
    split: Split, threshold: float, features: npt.NDArray[np.floating]
) -> list[FittedLikes]:
    """Fit ``like_rate`` and, on top of it, ``like_ridge``.

    Args:
        split: Train to fit on and validation to choose on.
        threshold: A rating of at least this is a like.
        features: [num_items, D], finite.

    Raises:
        DataError: There are no ratings.
    """
    train = _Train.of(split.train.interactions, threshold, len(features))
    liked = split.validation.liked(threshold)

    def made(name: str, settings: Mapping[str, float], x: FloatArray) -> FittedLikes:
        rates = train.rates(settings["damping"])
        weights = train.ridge(x, **settings)
        unjudged = FittedLikes(name, settings, np.nan, rates, x, weights)
        aucs = unjudged.aucs(split.validation, liked)
        defined = aucs[~np.isnan(aucs)]
        mean = float(defined.mean()) if len(defined) else math.nan
        return dataclasses.replace(unjudged, validation_auc=mean)

    # A ridge on no features is the like rate alone.
    nothing, scaled = features[:, :0].astype(np.float64), _standardised(features)
    rates = [made(LIKE_RATE, {"damping": damping}, nothing) for damping in DAMPINGS]
    rate = max(rates, key=lambda one: one.validation_auc)
    ridges = (made(LIKE_RIDGE, {**rate.hyperparameters, "l2": l2}, scaled) for l2 in RIDGES)
    return [rate, max(ridges, key=lambda one: one.validation_auc)]


@dataclass(frozen=True)
class _Train:
    """The rated items of each user, each with its last rating, and counts over all users.

    Attributes:
        rated: Per user the distinct items, and 1.0 for each liked item, else 0.0.
        likes, ratings: float64 [I], how many of them each item has, repeats included.
        mean: The share of likes among all ratings.
    """

    rated: list[tuple[npt.NDArray[np.integer], FloatArray]]
    likes: FloatArray
    ratings: FloatArray
    mean: float

    @classmethod
    def of(cls, train: Interactions, threshold: float, num_items: int) -> "_Train":
        assert train.ratings is not None
        liked = (train.ratings >= threshold).astype(np.float64)
        rated = []
        for start, stop in itertools.pairwise(train.offsets):
            # Reversed, because np.unique returns the first place: here that of the newest rating.
            items, places = np.unique(train.items[start:stop][::-1], return_index=True)
            rated.append((items, liked[start:stop][::-1][places]))
        return cls(
            rated,
            np.bincount(train.items, liked, num_items).astype(np.float64),
            np.bincount(train.items, minlength=num_items).astype(np.float64),
            float(liked.mean()) if len(liked) else 0.5,
        )

    def rates(self, damping: float) -> FloatArray:
        """The like rate of every item, float64 [I]."""
        return self._damped(self.likes, self.ratings, damping)

    def ridge(self, x: FloatArray, damping: float, l2: float = 1.0) -> FloatArray:
        """Each user's weights for the features ``x``, float64 [U, D]; 0 without training items.

        Time grows with users times the cube of the number of features.
        """
        weights = np.zeros((len(self.rated), x.shape[1]))
        for own, (items, liked) in zip(weights, self.rated, strict=True):
            if len(items) and len(own):
                without = self._damped(self.likes[items] - liked, self.ratings[items] - 1, damping)
                centred = x[items] - x[items].mean(axis=0)
                gram = centred.T @ centred + l2 * np.eye(len(own))
                own[:] = np.linalg.solve(gram, centred.T @ (liked - without))
        return weights

    def _damped(self, likes: FloatArray, ratings: FloatArray, damping: float) -> FloatArray:
        total = ratings + damping
        unknown = np.full(len(total), self.mean)
        return np.divide(likes + damping * self.mean, total, out=unknown, where=total > 0)


def _standardised(features: npt.NDArray[np.floating]) -> FloatArray:
    centred: FloatArray = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    size = np.sqrt((centred**2).sum(axis=1).mean())
    return centred / size if size > 0 else centred
