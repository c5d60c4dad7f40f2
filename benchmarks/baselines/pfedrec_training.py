"""Training PFedRec, with negatives drawn honestly or as published.

The published code excludes a user's held-out items from its training negatives. Everything else
is drawn sooner or later and pushed down, so the held-out items alone stay up: the test leaks into
training. `Negatives.PUBLISHED` reproduces that, under a method name that says so; it is no result.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from benchmarks.baselines.measuring import SELECTED_BY, Trained, negatives_of, rank
from benchmarks.baselines.pfedrec_model import (
    Examples,
    Round,
    Settings,
    initial_state,
    take_round,
)
from pfm_llm.base.errors import TrainingError
from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.splits import HeldOut, Split, TrainData
from pfm_llm.evaluation.ranking import headline

GRID = (Settings(), Settings(lr_eta=20.0), Settings(lr_eta=320.0))
"""What ``--grid`` compares on validation; without it the first."""


class Negatives(StrEnum):
    """What a user's training negatives are drawn from."""

    HONEST = "honest"
    """All items but those of the user's train history."""

    PUBLISHED = "published"
    """All items but those of the user's whole history, held-out items included: a leak."""


METHODS = {
    Negatives.HONEST: "pfedrec",
    Negatives.PUBLISHED: "pfedrec_published_leaking",
}


@dataclass(frozen=True)
class _Best:
    value: float
    scores: np.ndarray
    settings: Settings
    round_number: int


def train(
    config: ExperimentConfig, split: Split, settings: Sequence[Settings], negatives: Negatives
) -> Trained:
    """The best round of the best of some settings; ties keep the first.

    Args:
        config: Seed and evaluation are read.
        split: Train is trained on, validation chosen on. Test is read by
            `Negatives.PUBLISHED` alone.
        settings: At least one.
        negatives: How training negatives are drawn.

    Raises:
        TrainingError: The scores are not finite.
    """
    honest = negatives is Negatives.HONEST
    pools = honest_pools(split.train) if honest else published_pools(split)
    candidates = negatives_of(split.validation, split, config)
    best: _Best | None = None
    history: list[dict[str, Any]] = []
    total = sum(setting.rounds for setting in settings)
    with Progress(total, f"training PFedRec, {negatives} negatives", unit="rounds") as progress:
        for setting in settings:
            for number, done in enumerate(_rounds(split.train, pools, setting, config.seed), 1):
                figures = headline(rank(_Scorer(done.scores), split.validation, candidates))
                tried = {**dataclasses.asdict(setting), "round": number, "loss": done.loss}
                history.append(tried | figures)
                if best is None or figures[SELECTED_BY] > best.value:
                    best = _Best(figures[SELECTED_BY], done.scores, setting, number)
                progress.update(loss=done.loss, ndcg=figures[SELECTED_BY])
    assert best is not None
    num_clients = int(np.count_nonzero(np.diff(split.train.interactions.offsets)))
    return Trained(
        METHODS[negatives],
        f"{best.round_number} rounds x {num_clients} clients",
        {**dataclasses.asdict(best.settings), "round": best.round_number, "negatives": negatives},
        history,
        _Scorer(best.scores),
    )


def honest_pools(train: TrainData) -> list[np.ndarray]:
    """Per user the items that are not in its train history, int64, ascending."""
    interactions = train.interactions
    num_items = len(interactions.catalogue)
    return [
        _others(interactions.history(user), num_items) for user in range(interactions.num_users)
    ]


def published_pools(split: Split) -> list[np.ndarray]:
    """`honest_pools` without the held-out items: what leaks them."""
    pools = honest_pools(split.train)
    for held_out in (split.validation, split.test):
        for user, targets in zip(held_out.users, held_out.targets, strict=True):
            pools[user] = np.setdiff1d(pools[user], targets)
    return pools


def draw_examples(
    history: np.ndarray, pool: np.ndarray, num_negatives: int, random: np.random.Generator
) -> Examples:
    """A client's positives and fresh negatives, shuffled.

    Args:
        history: Its train items, int [n].
        pool: What its negatives are drawn from, uniformly and with replacement.
        num_negatives: Per positive; none where the pool is empty.
        random: Of this client and round.
    """
    num_drawn = num_negatives * len(history) if len(pool) else 0
    negatives = pool[random.integers(len(pool), size=num_drawn)] if num_drawn else pool[:0]
    order = random.permutation(len(history) + num_drawn)
    labels = np.repeat(np.array([1, 0], np.float32), (len(history), num_drawn))
    return Examples(np.concatenate([history, negatives]).astype(np.int64)[order], labels[order])


def _rounds(
    train: TrainData, pools: Sequence[np.ndarray], settings: Settings, seed: int
) -> Iterator[Round]:
    interactions = train.interactions
    num_users, num_items = interactions.num_users, len(interactions.catalogue)
    state = initial_state(num_users, num_items, settings.dim, seed)
    for number in range(1, settings.rounds + 1):
        examples = [
            draw_examples(
                interactions.history(user),
                pools[user],
                settings.num_negatives,
                numpy_generator(seed, "pfedrec examples", number, str(user)),
            )
            for user in range(num_users)
        ]
        done = take_round(state, examples, settings)
        if not np.isfinite(done.scores).all():
            raise TrainingError(
                f"PFedRec: scores of round {number} are not finite; lower lr or lr_eta"
            )
        state = done.state
        yield done


def _others(items: np.ndarray, num_items: int) -> np.ndarray:
    return np.setdiff1d(np.arange(num_items), items)


@dataclass(frozen=True)
class _Scorer:
    """Scores of all users as a `measuring.Score`."""

    scores: np.ndarray

    def __call__(self, held_out: HeldOut, queries: Sequence[int]) -> np.ndarray:
        own: np.ndarray = self.scores[held_out.users[np.asarray(queries)]]
        return own
