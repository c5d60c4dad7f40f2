"""Users of whom little is known: quality after their first so many interactions."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from pfm_llm.base.processes import Processes
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.settings import like_threshold
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import TrainData
from pfm_llm.evaluation import evaluator, personality, ranking
from pfm_llm.evaluation.evaluator import EvaluationTask, Evaluator
from pfm_llm.model.head import ITEM_BIAS
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.report import measure
from pfm_llm.runs.run import Assembly, make_trainer
from pfm_llm.runs.study.served import quality_of

_SERVED = (Mode.SHARED_ONLY, Mode.SHARED_PRIVATE)


def known_by_none(assembly: Assembly, task: EvaluationTask) -> np.ndarray:
    """Log-rank quality [U] without a history: item biases alone rank, for everybody alike."""
    held_out = task.held_out
    num_items = assembly.parts.model.num_items
    bias = task.shared.tensors.get(ITEM_BIAS, torch.zeros(num_items)).numpy()
    empty = dataclasses.replace(
        held_out, histories=tuple(np.zeros(0, np.int32) for _ in held_out.users)
    )
    queries = range(len(held_out.users))
    scores = np.broadcast_to(bias, (len(queries), num_items))
    ranks = ranking.rank_scores(scores, empty, queries, task.negatives)
    return personality.user_quality("log_rank", ranks.full, ranks.users)


def known_by_few(
    assembly: Assembly, task: EvaluationTask, given: int, folder: Path, processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Log-rank quality [U] with and without a private adapter fitted to ``given`` events.

    Args:
        assembly: The run's objects.
        task: What to rank; its histories are replaced.
        given: How many of each user's first events are known, at least 1.
        folder: A private folder, for a store of its own.
        processes: Who works on it.
    """
    config = assembly.config
    train = first_events(assembly.corpus.split.train.interactions, given)
    rated = task.held_out.history_ratings
    few = dataclasses.replace(
        task,
        held_out=dataclasses.replace(
            task.held_out,
            histories=tuple(history[:given] for history in task.held_out.histories),
            history_ratings=None if rated is None else tuple(own[:given] for own in rated),
        ),
        parts=evaluator.parts_of(_SERVED, config.adapters.private.weight),
        keep=False,
        liked=None,
    )
    clients = tuple(assembly.histories.clients.values())
    parts, cache = assembly.parts, assembly.cache
    histories = ClientHistories(
        clients, TrainData(train), parts.encoder, cache, like_threshold(config)
    )
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        # An empty store: what a client learned from its whole history must not be known.
        store = PrivateStore(Path(empty))
        trainer = make_trainer(config, parts, histories, store)
        afresh = Evaluator(parts.model, trainer, histories, parts.encoder, cache, store)
        found = measure(dataclasses.replace(assembly, evaluator=afresh), processes, few)
    return (
        quality_of(found, Mode.SHARED_PRIVATE),
        quality_of(found, Mode.SHARED_ONLY),
    )


def first_events(interactions: Interactions, count: int) -> Interactions:
    """Every user's first ``count`` events, in arrays of their own."""
    lengths = np.diff(interactions.offsets)
    place = np.arange(len(interactions.items)) - np.repeat(interactions.offsets[:-1], lengths)
    kept = place < count
    times, ratings = interactions.timestamps, interactions.ratings
    return dataclasses.replace(
        interactions,
        offsets=np.concatenate(([0], np.cumsum(np.minimum(lengths, count)))),
        items=interactions.items[kept],
        timestamps=None if times is None else times[kept],
        ratings=None if ratings is None else ratings[kept],
    )
