"""Training SASRec: every setting, epoch by epoch; the best epoch on validation counts."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.measuring import SELECTED_BY, Trained, negatives_of, rank
from benchmarks.baselines.sasrec_model import NO_TARGET, SasRec, Settings, cut, pad
from pfm_llm.base.errors import DataError, TrainingError
from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import derive_seed, numpy_generator
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.splits import HeldOut, Split
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix
from pfm_llm.evaluation.ranking import headline

METHOD = "sasrec"
GRID = (Settings(), Settings(dropout=0.5), Settings(dim=64))
"""What ``--grid`` compares on validation; without it the first."""


@dataclass(frozen=True)
class _Best:
    value: float
    model: SasRec
    settings: Settings
    epoch: int


def train(
    config: ExperimentConfig,
    split: Split,
    settings: Sequence[Settings],
    method: str = METHOD,
    network: Callable[[int, Any], SasRec] = SasRec,
) -> Trained:
    """The best epoch of the best of some settings; ties keep the first.

    Args:
        config: Seed and evaluation are read.
        split: Train is trained on, validation chosen on; test is not read.
        settings: At least one.
        method: The name of the method.
        network: Makes an untrained network for a number of items and one of the settings.

    Raises:
        DataError: No training history has two items.
        TrainingError: A loss is not finite.
    """
    interactions = split.train.interactions
    histories = [interactions.history(user) for user in range(interactions.num_users)]
    negatives = negatives_of(split.validation, split, config)
    best: _Best | None = None
    history: list[dict[str, Any]] = []
    total = sum(setting.epochs for setting in settings)
    with Progress(total, f"training {method}", unit="epochs") as progress:
        for setting in settings:
            make = functools.partial(network, len(interactions.catalogue), setting)
            epochs = train_epochs(histories, make, setting, config.seed)
            for epoch, (model, loss) in enumerate(epochs, 1):
                figures = headline(rank(_Scorer(model), split.validation, negatives))
                history.append(
                    {**dataclasses.asdict(setting), "epoch": epoch, "loss": loss} | figures
                )
                if best is None or figures[SELECTED_BY] > best.value:
                    best = _Best(figures[SELECTED_BY], copy.deepcopy(model), setting, epoch)
                progress.update(loss=loss, ndcg=figures[SELECTED_BY])
    assert best is not None
    return Trained(
        method,
        f"pooled data, {best.epoch} epochs",
        {**dataclasses.asdict(best.settings), "epoch": best.epoch},
        history,
        _Scorer(best.model),
    )


def train_epochs(
    histories: Histories, network: Callable[[], SasRec], settings: Settings, seed: int
) -> Iterator[tuple[SasRec, float]]:
    """Train from scratch, epoch by epoch.

    Args:
        histories: Per user the training item ids, oldest first.
        network: Makes the untrained network.
        settings: How to train it.
        seed: The experiment's seed.

    Yields:
        After each epoch the model, which the next epoch changes, and the mean training loss.

    Raises:
        DataError: No history has two items.
        TrainingError: The loss is not finite.
    """
    windows = [pair for history in histories for pair in cut(history, settings.window)]
    if not windows:
        raise DataError("SASRec: no training history has two items; use a source with longer ones")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "sasrec initial"))
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    for epoch in range(1, settings.epochs + 1):
        order = numpy_generator(seed, "sasrec order", epoch).permutation(len(windows))
        # Dropout draws from the global state, which stays that of whoever asks for epochs.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "sasrec dropout", epoch))
            losses = [
                _step(model, optimizer, [windows[w] for w in order[start : start + settings.batch]])
                for start in range(0, len(order), settings.batch)
            ]
        if not np.isfinite(losses).all():
            raise TrainingError(f"SASRec: the loss of epoch {epoch} is not finite; lower the lr")
        yield model, float(np.mean(losses))


@dataclass(frozen=True)
class _Scorer:
    """A model as a `measuring.Score`."""

    model: SasRec

    def __call__(self, held_out: HeldOut, queries: Sequence[int]) -> ScoreMatrix:
        return self.model.score([held_out.histories[query] for query in queries])


def _step(
    model: SasRec,
    optimizer: torch.optim.Optimizer,
    windows: Sequence[tuple[np.ndarray, np.ndarray]],
) -> float:
    model.train()
    items, targets = zip(*windows, strict=True)
    loss = model.loss(pad(items, 0), pad(targets, NO_TARGET))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
