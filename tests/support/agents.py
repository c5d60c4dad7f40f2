"""A tiny recommender for an agent, and what a user of it met."""

from pathlib import Path

import numpy as np

from pfm_llm.base.processes import Processes
from pfm_llm.protocol.types import SharedState
from pfm_llm.recommender import Recommender
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.run import assemble, load_corpus
from tests.support.tiny import Tiny
from tests.support.tiny_models import stirred

HISTORY = (3, 8, 1, 20, 14, 6, 9)
"""Internal ids of items."""


def history_of(model: Recommender, number: int) -> list[str]:
    """External ids of what one of many users met, three to seven items."""
    ids = model.catalogue.item_ids
    generator = np.random.default_rng(number)
    return [ids[item] for item in generator.choice(len(ids), 3 + number % 5, replace=False)]


class Clock:
    """A second goes by each time that it is read."""

    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def tiny_recommender(tiny: Tiny, processes: Processes, folder: Path) -> Recommender:
    """A recommender of method `pfm` whose shared part is random."""
    config = tiny.config(folder, method="pfm")
    run = assemble(config, load_corpus(config), RunFolders.of(folder / config.name), processes)
    shared = SharedState(stirred(run.model.shared.tensors, seed=5), 3)
    return Recommender.of_run(run, run.as_set(shared))
