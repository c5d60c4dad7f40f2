"""Fit baselines on train, each with the hyperparameters that are best on validation."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product, starmap

import numpy as np

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.progress import Progress
from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation.baselines.common import Baseline, Histories, ScoreMatrix, Scorer
from pfm_llm.evaluation.baselines.ease import Ease, check_size
from pfm_llm.evaluation.baselines.ease_markov import EaseMarkov, mixtures
from pfm_llm.evaluation.baselines.item_knn import ItemKnn
from pfm_llm.evaluation.baselines.markov import MarkovRecency
from pfm_llm.evaluation.baselines.popularity import Popularity
from pfm_llm.evaluation.metrics import mean_over_users, ndcg
from pfm_llm.evaluation.scoring import full_ranks, queries_at_once

EASE_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Weights of EASE that ``ease_markov`` tries."""

_QUERIES_AT_ONCE = 512


class BaselineName(StrEnum):
    """The baselines of ``evaluation.baselines``."""

    POPULARITY = "popularity"
    EASE = "ease"
    MARKOV_RECENCY = "markov_recency"
    ITEM_KNN = "item_knn"
    EASE_MARKOV = "ease_markov"


@dataclass(frozen=True)
class FittedBaseline:
    """A fitted baseline.

    Attributes:
        name: Its key in ``evaluation.baselines`` and ``results.json``.
        hyperparameters: The values that were chosen on validation.
        validation_ndcg: NDCG@10 on validation over the full catalogue.
        num_items: Size of the catalogue.
    """

    name: BaselineName
    hyperparameters: Mapping[str, float]
    validation_ndcg: float
    num_items: int
    _model: Scorer = field(repr=False)

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Scorer.score`."""
        return self._model.score(histories)


def fit_baselines(
    names: Sequence[str],
    train_histories: Histories,
    num_items: int,
    validation: HeldOut,
) -> list[FittedBaseline]:
    """Fit baselines on train, each with the hyperparameters that are best on validation.

    Args:
        names: `BaselineName` values; the result keeps their order.
        train_histories: Per user the training item ids in order of time.
        num_items: Size of the catalogue.
        validation: The queries on which settings are compared by NDCG@10 over the full catalogue,
            seen items masked. Of equal settings the first one in the grid is kept.

    Raises:
        ConfigError: A name is unknown.
        DataError: The catalogue is too large for a method, or validation is empty.
    """
    wanted = parse_names(names)
    with Progress(_num_settings(wanted), "fitting baselines", unit="settings") as progress:
        selection = _Selection(train_histories, num_items, validation, progress)
        return [selection.best(name) for name in wanted]


def parse_names(names: Sequence[str]) -> list[BaselineName]:
    """The baselines of these names.

    Raises:
        ConfigError: A name is unknown; the message gives the nearest or all valid ones.
    """
    valid = [known.value for known in BaselineName]
    for name in names:
        if name not in valid:
            nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"valid: {', '.join(valid)}"
            raise ConfigError(f"evaluation.baselines: unknown baseline {name!r}; {hint}")
    return [BaselineName(name) for name in names]


def check_baselines(names: Sequence[str], num_users: int, num_items: int) -> None:
    """Check what `fit_baselines` would find, without fitting anything.

    Raises:
        ConfigError, DataError: See `fit_baselines`.
    """
    if {BaselineName.EASE, BaselineName.EASE_MARKOV} & set(parse_names(names)):
        check_size(num_users, num_items)


def num_settings(name: BaselineName) -> int:
    """How many settings validation chooses among; those of its parts included for a mixture."""
    if name is not BaselineName.EASE_MARKOV:
        return len([*_grid(name)])
    parts = (BaselineName.EASE, BaselineName.MARKOV_RECENCY)
    return len(EASE_WEIGHTS) + sum(map(num_settings, parts))


class _Selection:
    """Chooses the setting of each baseline once, even if a mixture uses the baseline too."""

    def __init__(
        self,
        train_histories: Histories,
        num_items: int,
        validation: HeldOut,
        progress: Progress,
    ) -> None:
        self._progress = progress
        self._train_histories = train_histories
        self._num_items = num_items
        self._validation = validation
        self._chosen: dict[BaselineName, FittedBaseline] = {}

    def best(self, name: BaselineName) -> FittedBaseline:
        """The fitted baseline with its best setting."""
        if name not in self._chosen:
            mixed = name is BaselineName.EASE_MARKOV
            self._chosen[name] = self._best_mixture() if mixed else self._best_setting(name)
        return self._chosen[name]

    def _best_setting(self, name: BaselineName) -> FittedBaseline:
        def fit(setting: Baseline) -> FittedBaseline:
            model = setting.fit(self._train_histories, self._num_items)
            [value] = self._validation_ndcg(lambda histories: [model.score(histories)])
            self._progress.update()
            return FittedBaseline(name, model.hyperparameters, value, self._num_items, model)

        # With generators, only the best model so far and the newest one are in memory.
        return max((fit(setting) for setting in _grid(name)), key=lambda made: made.validation_ndcg)

    def _best_mixture(self) -> FittedBaseline:
        ease, markov = self.best(BaselineName.EASE), self.best(BaselineName.MARKOV_RECENCY)
        values = self._validation_ndcg(
            lambda histories: mixtures(ease, markov, EASE_WEIGHTS, histories)
        )
        self._progress.update()
        model = EaseMarkov(ease, markov, EASE_WEIGHTS[int(np.argmax(values))])
        return FittedBaseline(
            BaselineName.EASE_MARKOV, model.hyperparameters, max(values), self._num_items, model
        )

    def _validation_ndcg(self, score: Callable[[Histories], Iterable[ScoreMatrix]]) -> list[float]:
        """NDCG@10 of each score matrix that ``score`` yields, in order."""
        histories, targets = self._validation.histories, self._validation.targets
        batch = queries_at_once(self._num_items, _QUERIES_AT_ONCE)
        values: list[list[np.ndarray]] = []
        for start in range(0, max(len(targets), 1), batch):
            part = slice(start, start + batch)
            ranks = (
                full_ranks(scores, histories[part], targets[part])
                for scores in score(histories[part])
            )
            values.append([ndcg(each, HEADLINE_K) for each in ranks])
        queries = np.repeat(np.arange(len(targets)), [len(wanted) for wanted in targets])
        return [
            mean_over_users(np.concatenate(each), queries) for each in zip(*values, strict=True)
        ]


def _num_settings(names: Sequence[BaselineName]) -> int:
    """How many fits the baselines take; the weights of a mixture are tried in one."""
    wanted = set(names)
    if BaselineName.EASE_MARKOV in wanted:
        wanted |= {BaselineName.EASE, BaselineName.MARKOV_RECENCY}
    mixed = BaselineName.EASE_MARKOV
    return sum(1 if name is mixed else num_settings(name) for name in wanted)


def _grid(name: BaselineName) -> Iterator[Baseline]:
    match name:
        case BaselineName.POPULARITY:
            yield Popularity()
        case BaselineName.EASE:
            yield from map(Ease, (50.0, 100.0, 200.0, 500.0, 1000.0))
        case BaselineName.MARKOV_RECENCY:
            grid = product((0.7, 0.8, 0.9), ((0.7, 5), (0.9, 10)), (10.0, 100.0))
            for decay, (distance_decay, window), smoothing in grid:
                yield MarkovRecency(decay, distance_decay, window, smoothing)
        case BaselineName.ITEM_KNN:
            yield from starmap(ItemKnn, product((5, 10, 20, 50, 100, 200), (0.0, 10.0, 100.0)))
        case BaselineName.EASE_MARKOV:
            raise AssertionError("a mixture has no grid of its own to fit")
