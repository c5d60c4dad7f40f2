"""Central baselines that need no gradient: popularity, EASE, recency-weighted Markov.

All are fitted once, on training histories alone, and then score any histories of the same
catalogue; hyperparameters are chosen on validation and nothing is refitted for the test.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from pfm_llm.errors import ConfigError, DataError, TrainingError
from pfm_llm.metrics import mean_over_users, ndcg
from pfm_llm.scoring import full_ranks

Histories = Sequence[npt.NDArray[np.integer]]
ScoreMatrix = npt.NDArray[np.float32]
_Parameters = TypeVar("_Parameters")

MAX_DENSE_ITEMS = 20_000
"""Above this an item-by-item matrix (float64, 3.2 GB) is more than a baseline is worth."""

_SELECTION_K = 10
_QUERIES_AT_ONCE = 512
_NEGLIGIBLE_WEIGHT = 1e-3


class BaselineName(StrEnum):
    """The baselines of ``evaluation.baselines``."""

    POPULARITY = "popularity"
    EASE = "ease"
    MARKOV_RECENCY = "markov_recency"


class Baseline(Protocol):
    """A scorer fitted on histories."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """What was set before fitting."""

    def fit(self, histories: Histories, num_items: int) -> Self:
        """Fit on training histories and return itself.

        Args:
            histories: Per user the item ids in order of time, each in [0, num_items).
            num_items: Size of the catalogue.

        Raises:
            DataError: The catalogue is empty, too large, or an id is outside of it.
        """

    def score(self, histories: Histories) -> ScoreMatrix:
        """Score every item as the next one.

        Args:
            histories: Per query the item ids in order of time; empty is fine.

        Returns:
            float32 [queries, num_items], higher is better; seen items are not masked.

        Raises:
            DataError: An id is outside the catalogue.
            TrainingError: `fit` was not called.
        """


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
        items, _ = _flatten(histories, num_items)
        self._counts = np.bincount(items, minlength=num_items).astype(np.float32)
        return self

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`; equal for all histories."""
        return np.tile(_fitted(self._counts), (len(histories), 1))


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
        seen = _seen_matrix(histories, num_items)
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
        weights = _fitted(self._weights)
        return np.asarray(_seen_matrix(histories, len(weights)) @ weights)


class MarkovRecency:
    """A Markov chain over items, asked by all of a history with the newest weighing most.

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
        items, users = _flatten(histories, num_items)
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
        shares = _fitted(self._shares)
        items, users = _flatten(histories, shares.shape[0])
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


class HeldOutQueries(Protocol):
    """What choosing hyperparameters needs of a validation set."""

    @property
    def histories(self) -> Histories:
        """Per query the item ids that came before."""

    @property
    def targets(self) -> Histories:
        """Per query at least one item id that came next, none from its history."""


@dataclass(frozen=True)
class FittedBaseline:
    """A baseline, ready to score.

    Attributes:
        name: Its key in ``evaluation.baselines`` and ``results.json``.
        hyperparameters: As chosen on validation.
        validation_ndcg: NDCG@10 on validation over the full catalogue.
    """

    name: BaselineName
    hyperparameters: Mapping[str, float]
    validation_ndcg: float
    _model: Baseline = field(repr=False)

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Baseline.score`."""
        return self._model.score(histories)


def fit_baselines(
    names: Sequence[str],
    train_histories: Histories,
    num_items: int,
    validation: HeldOutQueries,
) -> list[FittedBaseline]:
    """Fit baselines on train, each with the hyperparameters that are best on validation.

    Args:
        names: `BaselineName` values; the result keeps their order.
        train_histories: Per user the training item ids in order of time.
        num_items: Size of the catalogue.
        validation: Where NDCG@10 over the full catalogue is compared; ties keep the setting
            that comes first in the grid. Seen items are masked.

    Raises:
        ConfigError: A name is unknown.
        DataError: The catalogue is too large for a method, or validation is empty.
    """
    chosen = parse_names(names)
    return [_choose(name, train_histories, num_items, validation) for name in chosen]


def parse_names(names: Sequence[str]) -> list[BaselineName]:
    """The baselines of these names.

    Raises:
        ConfigError: A name is unknown; the message gives the nearest or all valid ones.
    """
    return [_parse_name(name) for name in names]


def _choose(
    name: BaselineName,
    train_histories: Histories,
    num_items: int,
    validation: HeldOutQueries,
) -> FittedBaseline:
    def fit(setting: Baseline) -> FittedBaseline:
        model = setting.fit(train_histories, num_items)
        value = _validation_ndcg(model, validation)
        return FittedBaseline(name, model.hyperparameters, value, model)

    # Generators all the way: only the best model so far and the newest are in memory.
    return max((fit(setting) for setting in _grid(name)), key=lambda fitted: fitted.validation_ndcg)


def _grid(name: BaselineName) -> Iterator[Baseline]:
    match name:
        case BaselineName.POPULARITY:
            yield Popularity()
        case BaselineName.EASE:
            for l2 in (50.0, 100.0, 200.0, 500.0, 1000.0):
                yield Ease(l2)
        case BaselineName.MARKOV_RECENCY:
            for decay in (0.7, 0.8, 0.9):
                for distance_decay, window in ((0.7, 5), (0.9, 10)):
                    for smoothing in (10.0, 100.0):
                        yield MarkovRecency(decay, distance_decay, window, smoothing)


def _validation_ndcg(model: Baseline, validation: HeldOutQueries) -> float:
    histories, targets = validation.histories, validation.targets
    values, queries = [np.zeros(0)], [np.zeros(0, np.int64)]
    for start in range(0, len(targets), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        scores = model.score(histories[part])
        ranks = full_ranks(scores, histories[part], targets[part])
        values.append(ndcg(ranks, _SELECTION_K))
        counts = [len(wanted) for wanted in targets[part]]
        queries.append(start + np.repeat(np.arange(len(counts)), counts))
    return mean_over_users(np.concatenate(values), np.concatenate(queries))


def _parse_name(name: str) -> BaselineName:
    try:
        return BaselineName(name)
    except ValueError:
        valid = [known.value for known in BaselineName]
        nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"valid: {', '.join(valid)}"
        message = f"evaluation.baselines: unknown baseline {name!r}; {hint}"
    raise ConfigError(message)


def _flatten(
    histories: Histories, num_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All items after one another, and whose history each is in."""
    if num_items < 1:
        raise DataError("the catalogue has no items: a baseline needs at least one")
    items = np.concatenate([np.zeros(0, np.int64), *histories]).astype(np.int64)
    if items.size and (items.min() < 0 or items.max() >= num_items):
        bad = items.min() if items.min() < 0 else items.max()
        raise DataError(
            f"history item {bad} is outside the catalogue of {num_items} items; fit and score "
            "histories of one catalogue"
        )
    lengths = np.array([len(history) for history in histories], np.int64)
    return items, np.repeat(np.arange(len(histories)), lengths)


def _seen_matrix(histories: Histories, num_items: int) -> sparse.csr_array:
    """Binary, float32 [histories, num_items]."""
    items, users = _flatten(histories, num_items)
    ones = np.ones(len(items), np.float32)
    matrix = sparse.coo_array((ones, (users, items)), (len(histories), num_items)).tocsr()
    matrix.data[:] = 1.0  # repeated items were summed
    return matrix


def _fitted(parameters: _Parameters | None) -> _Parameters:
    if parameters is None:
        raise TrainingError("score() before fit(): call fit(histories, num_items) first")
    return parameters
