"""Cold start: the quality for users with only a few known interactions."""

import dataclasses

import numpy as np
import torch

from pfm_llm.data.interactions import Interactions
from pfm_llm.evaluation import ranking
from pfm_llm.evaluation.evaluator import EvaluationTask
from pfm_llm.evaluation.personality.estimates import user_quality
from pfm_llm.model.batches import stacked_tensors
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import measure, only, quality_of
from pfm_llm.runs.run import Run
from pfm_llm.runs.study.others import with_histories


def known_by_none(run: Run, task: EvaluationTask) -> np.ndarray:
    """Log-rank quality [U] without a history: only the item biases rank, equally for all users."""
    held_out, model = task.held_out, run.model.model
    unread = torch.zeros(1, model.item_texts.shape[1], device=model.item_texts.device)
    stacked = stacked_tensors(task.shared.tensors, 1, unread.device)
    bias = model.score_vectors([unread], stacked, Parts(private_weight=0.0))[0].cpu().numpy()
    empty = dataclasses.replace(
        held_out, histories=tuple(np.zeros(0, np.int32) for _ in held_out.users)
    )
    queries = range(len(held_out.users))
    scores = np.broadcast_to(bias, (len(queries), model.num_items))
    ranks = ranking.rank_scores(scores, empty, queries, task.negatives)
    return user_quality("log_rank", ranks.full, ranks.users)


def known_by_few(run: Run, task: EvaluationTask, given: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-rank quality [U] with and without a private part fitted to ``given`` events.

    Args:
        run: The run.
        task: The queries; their histories are replaced.
        given: Number of known first events of each user, at least 1.
    """
    train = first_events(run.data.split.train.interactions, given)
    rated = task.held_out.history_ratings
    held_out = dataclasses.replace(
        task.held_out,
        histories=tuple(history[:given] for history in task.held_out.histories),
        history_ratings=None if rated is None else tuple(own[:given] for own in rated),
    )
    few = only(task, Mode.SHARED_ONLY, Mode.SHARED_PRIVATE, held_out=held_out, liked=None)
    with with_histories(run, train) as other:
        found = measure(other, few)
    return quality_of(found, Mode.SHARED_PRIVATE), quality_of(found, Mode.SHARED_ONLY)


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
