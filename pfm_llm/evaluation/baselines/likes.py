"""References for the task ``like``: will a user like an item that was rated?

Both are central and not private. Fitted on train alone, they score items for users; what counts
is the order of a user's own items, measured by `metrics.per_user_auc` and averaged over the users
who have both liked and not liked held-out items. Nothing is refitted for the test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, fitted, flatten
from pfm_llm.evaluation.metrics import per_user_auc

Likes = Sequence[npt.NDArray[np.bool_]]
"""Per user whether each item of the history was liked."""

DAMPINGS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Values of ``damping`` that `choose_item_like_rate` tries."""

RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Values of ``l2`` that `choose_like_ridge` tries."""

_USERS_AT_ONCE = 512


class LikeScorer(Protocol):
    """A fitted reference."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """What was set before fitting."""

    def score(self, users: npt.NDArray[np.integer]) -> ScoreMatrix:
        """Score every item for some users.

        Args:
            users: [queries], rows of the training histories.

        Returns:
            float32 [queries, num_items], higher is more likely to be liked.

        Raises:
            TrainingError: It was not fitted.
        """


@dataclass(frozen=True)
class LikeQueries:
    """Held-out items and their labels; of a split ``held_out.users``, ``.targets``, ``.liked()``.

    Attributes:
        users: int [queries], rows of the training histories.
        targets: Per query the held-out item ids.
        liked: Per query whether each target was liked.
    """

    users: npt.NDArray[np.integer]
    targets: Histories
    liked: Likes


@dataclass(frozen=True)
class FittedLikes:
    """A reference, ready to score.

    Attributes:
        name: ``item_like_rate`` or ``like_ridge``.
        hyperparameters: As chosen on validation.
        validation_auc: Mean AUC per user on validation.
    """

    name: str
    hyperparameters: Mapping[str, float]
    validation_auc: float
    _model: LikeScorer = field(repr=False)

    def score(self, users: npt.NDArray[np.integer]) -> ScoreMatrix:
        """See `LikeScorer.score`."""
        return self._model.score(users)


class ItemLikeRate:
    """How well an item is liked, the same for everybody.

    An item with L likes among n ratings scores (L + damping · p) / (n + damping), p being the
    share of likes among all ratings: a few ratings leave it near the mean.

    Args:
        damping: In ratings, at least 0.

    Raises:
        ConfigError: ``damping`` is below 0.
    """

    def __init__(self, damping: float = 5.0) -> None:
        if not damping >= 0:
            raise ConfigError(f"the like rate's damping is {damping}: at least 0")
        self._damping = damping
        self._counts = np.zeros(0)
        self._likes = np.zeros(0)
        self._mean = 0.5
        self._rates: npt.NDArray[np.float64] | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The damping."""
        return {"damping": self._damping}

    def fit(self, histories: Histories, liked: Likes, num_items: int) -> "ItemLikeRate":
        """Count likes.

        Args:
            histories: Per user the training item ids.
            liked: Bool, of the same lengths.
            num_items: Size of the catalogue.

        Raises:
            DataError: Lengths differ, or an id is outside the catalogue.
        """
        items, labels = _pairs(histories, liked, num_items)
        self._counts = np.bincount(items, minlength=num_items).astype(np.float64)
        self._likes = np.bincount(items, labels, num_items).astype(np.float64)
        self._mean = float(labels.mean()) if len(labels) else 0.5
        self._rates = self._damped(self._likes, self._counts)
        return self

    def score(self, users: npt.NDArray[np.integer]) -> ScoreMatrix:
        """See `LikeScorer.score`."""
        return np.tile(fitted(self._rates).astype(np.float32), (len(users), 1))

    def without_own(
        self, items: npt.NDArray[np.integer], liked: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """The rates of training items as they are without one user's own ratings of them.

        Args:
            items: Distinct item ids of the user's training history.
            liked: Bool, of the same length.

        Returns:
            float64 of that length.
        """
        fitted(self._rates)
        return self._damped(self._likes[items] - liked, self._counts[items] - 1)

    def _damped(
        self, likes: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        total = counts + self._damping
        unknown = total <= 0
        rates = (likes + self._damping * self._mean) / np.where(unknown, 1, total)
        return np.where(unknown, self._mean, rates)


class LikeRidge:
    """The like rate, and a ridge regression of each user's own on item features.

    User u's score of item i is r(i) + w_u · x(i), with r the `ItemLikeRate` and x the features,
    centred over the catalogue and scaled so that the mean of |x|² is 1. With y = 1 for a like,
    and r₋ᵤ the rates without the user's own ratings (else they would explain themselves),

        w_u, b_u = argmin Σ_i (y_i - r₋ᵤ(i) - b - w · x(i))² + l2 · |w|²

    over the user's training items, in closed form: w = (X̄ᵀX̄ + l2 · I)⁻¹ X̄ᵀȳ with X̄ and ȳ
    centred over these items. b shifts all of a user's scores alike, and is left out of them. A
    user without training items has w = 0. Of an item that comes twice, the last rating counts.

    Args:
        features: [num_items, D], any float dtype.
        l2: Strength of the ridge, above 0.
        damping: Of the like rate.

    Raises:
        ConfigError: A value is out of range.
        DataError: The features are no matrix, or not finite.
    """

    def __init__(
        self, features: npt.NDArray[np.floating], l2: float = 30.0, damping: float = 5.0
    ) -> None:
        if not l2 > 0:
            raise ConfigError(f"the like ridge's l2 is {l2}: it must be above 0")
        if features.ndim != 2 or not np.isfinite(features).all():
            raise DataError(
                f"item features of shape {features.shape} must be a finite matrix [items, D]"
            )
        centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
        size = np.sqrt((centred**2).sum(axis=1).mean())
        self._features = centred / size if size > 0 else centred
        self._l2 = l2
        self._rate = ItemLikeRate(damping)
        self._weights: npt.NDArray[np.float64] | None = None

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The ridge and the damping."""
        return {"l2": self._l2, **self._rate.hyperparameters}

    def fit(self, histories: Histories, liked: Likes, num_items: int) -> "LikeRidge":
        """Fit every user's weights. Time grows with users times the cube of the features.

        Args:
            histories: Per user the training item ids.
            liked: Bool, of the same lengths.
            num_items: Size of the catalogue, the number of rows of the features.

        Raises:
            DataError: See `ItemLikeRate.fit`; the features are of another catalogue.
        """
        if num_items != len(self._features):
            raise DataError(
                f"item features have {len(self._features)} rows for {num_items} items; give one "
                "row for each item of the catalogue"
            )
        self._rate.fit(histories, liked, num_items)
        weights = [
            self._solve(items, labels) for items, labels in zip(histories, liked, strict=True)
        ]
        self._weights = np.stack(weights) if weights else np.zeros((0, self._features.shape[1]))
        return self

    def score(self, users: npt.NDArray[np.integer]) -> ScoreMatrix:
        """See `LikeScorer.score`."""
        own = fitted(self._weights)[users] @ self._features.T
        return (self._rate.score(users) + own).astype(np.float32)

    def _solve(
        self, items: npt.NDArray[np.integer], liked: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        dim = self._features.shape[1]
        if not len(items):
            return np.zeros(dim)
        # Reversed, so that the first place that unique gives is that of the newest rating.
        items, places = np.unique(items[::-1], return_index=True)
        liked = liked[::-1][places]
        residual = liked - self._rate.without_own(items, liked)
        x = self._features[items]
        x = x - x.mean(axis=0)
        gram = x.T @ x + self._l2 * np.eye(dim)
        weights: npt.NDArray[np.float64] = np.linalg.solve(gram, x.T @ residual)
        return weights


def choose_item_like_rate(
    histories: Histories, liked: Likes, num_items: int, validation: LikeQueries
) -> FittedLikes:
    """`ItemLikeRate` with the damping that has the best mean AUC per user on validation.

    Args:
        histories: Per user the training item ids.
        liked: Bool, of the same lengths.
        num_items: Size of the catalogue.
        validation: Held-out items of these users, and whether they were liked.

    Raises:
        DataError: See `ItemLikeRate.fit`; no user has an AUC on validation.
    """
    models = (ItemLikeRate(damping).fit(histories, liked, num_items) for damping in DAMPINGS)
    candidates = (
        FittedLikes("item_like_rate", m.hyperparameters, mean_user_auc(m, validation), m)
        for m in models
    )
    return max(candidates, key=lambda made: made.validation_auc)


def choose_like_ridge(
    histories: Histories,
    liked: Likes,
    features: npt.NDArray[np.floating],
    validation: LikeQueries,
) -> FittedLikes:
    """`LikeRidge` with the l2 that is best on validation, on top of the best `ItemLikeRate`.

    Args:
        histories: Per user the training item ids.
        liked: Bool, of the same lengths.
        features: [num_items, D].
        validation: Held-out items of these users, and whether they were liked.

    Raises:
        DataError: See `LikeRidge`; no user has an AUC on validation.
    """
    num_items = len(features)
    rate = choose_item_like_rate(histories, liked, num_items, validation)
    damping = rate.hyperparameters["damping"]
    models = (LikeRidge(features, l2, damping).fit(histories, liked, num_items) for l2 in RIDGES)
    candidates = (
        FittedLikes("like_ridge", m.hyperparameters, mean_user_auc(m, validation), m)
        for m in models
    )
    return max(candidates, key=lambda made: made.validation_auc)


def mean_user_auc(model: LikeScorer, queries: LikeQueries) -> float:
    """Mean over users of the AUC of their held-out items; see `metrics.per_user_auc`.

    Raises:
        DataError: Nobody has both liked and not liked held-out items.
    """
    scores: list[ScoreMatrix] = []
    for start in range(0, len(queries.users), _USERS_AT_ONCE):
        part = slice(start, start + _USERS_AT_ONCE)
        rows = model.score(queries.users[part])
        scores += [row[wanted] for row, wanted in zip(rows, queries.targets[part], strict=True)]
    values = per_user_auc(scores, queries.liked)
    defined = values[~np.isnan(values)]
    if not defined.size:
        raise DataError("AUC: no user has both liked and not liked held-out items")
    return float(defined.mean())


def _pairs(
    histories: Histories, liked: Likes, num_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """All items after one another, and whether each was liked."""
    items, _ = flatten(histories, num_items)
    lengths = [len(history) for history in histories], [len(labels) for labels in liked]
    if lengths[0] != lengths[1]:
        raise DataError("histories and likes differ in length: give a like for each item")
    return items, np.concatenate([np.zeros(0, np.bool_), *liked]).astype(np.bool_)
