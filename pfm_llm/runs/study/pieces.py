"""Controls of what is personal: one piece of a private part alone, and the mean of all users'.

Where the client takes private steps on what it has read off its history, what was read is served
without them as well.

The private part of a *mean user* is the mean of all users' private tensors. It is read by the same
shared features and has nothing of the user's own. What a user's own part has more is personal; what
the mean has more than the shared part is what these features add for everybody.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch

from pfm_llm.config.settings import with_setting
from pfm_llm.evaluation.evaluator import EvaluationTask, Measured
from pfm_llm.evaluation.personality.estimates import (
    RANK_QUALITIES,
    Bootstrap,
    Estimate,
    paired_difference,
)
from pfm_llm.protocol.types import Mode, Tensors
from pfm_llm.runs.measuring import measure, only, quality_of
from pfm_llm.runs.run import Run, make_trainer
from pfm_llm.runs.study.served import Served


def controls(
    served: Served,
    task: EvaluationTask,
    found: Measured,
    pieces: Mapping[str, str],
    bootstrap: Bootstrap,
    k: int,
) -> dict[str, Estimate]:
    """Differences of the qualities log-rank and NDCG, paired over users.

    Args:
        served: Serves users with given private parts.
        task: The queries, with the shared part alone and with the private part.
        found: What `measure` found for the task.
        pieces: See `PrivatePart.pieces`.
        bootstrap: The settings of the intervals.
        k: Cut-off of the NDCG.

    Returns:
        ``own_over_mean_<quality>`` and ``mean_over_shared_<quality>``, and for each piece
        ``<piece>_alone_<quality>``: what the piece adds to the shared part without the others.
    """
    with_private = only(task, Mode.SHARED_PRIVATE, liked=None)
    mean = served.mean_part()

    def like_everybody(own: Tensors) -> Tensors:
        return {name: mean[name].expand(value.shape) for name, value in own.items()}

    everybody = served.changed(with_private, like_everybody, "serving a mean user's part")
    estimates = {}
    for name in RANK_QUALITIES:
        shared = quality_of(found, Mode.SHARED_ONLY, name, k)
        own = quality_of(found, Mode.SHARED_PRIVATE, name, k)
        of_mean = quality_of(everybody, Mode.SHARED_PRIVATE, name, k)
        estimates[f"own_over_mean_{name}"] = paired_difference(own, of_mean, bootstrap)
        estimates[f"mean_over_shared_{name}"] = paired_difference(of_mean, shared, bootstrap)
    return estimates | pieces_alone(serve_pieces(served, task, pieces), found, bootstrap, k)


def pieces_alone(
    alone: Mapping[str, Measured], found: Measured, bootstrap: Bootstrap, k: int
) -> dict[str, Estimate]:
    """What each piece adds to the shared part without the others, paired over users.

    Args:
        alone: What `serve_pieces` found.
        found: What was found for the same queries in the mode ``shared_only``.
        bootstrap: The settings of the intervals.
        k: Cut-off of the NDCG.

    Returns:
        ``<piece>_alone_<quality>`` for the qualities log-rank and NDCG.
    """
    return {
        f"{piece}_alone_{name}": paired_difference(
            quality_of(measured, Mode.SHARED_PRIVATE, name, k),
            quality_of(found, Mode.SHARED_ONLY, name, k),
            bootstrap,
        )
        for name in RANK_QUALITIES
        for piece, measured in alone.items()
    }


def serve_pieces(
    served: Served, task: EvaluationTask, pieces: Mapping[str, str]
) -> dict[str, Measured]:
    """Serve the users of a task with the shared part and one piece of their private parts.

    Args:
        served: Serves users with given private parts.
        task: The queries, with the private part.
        pieces: See `PrivatePart.pieces`.

    Returns:
        Piece to what was measured, in the mode ``shared_private``.
    """
    with_private = only(task, Mode.SHARED_PRIVATE, liked=None)
    return {
        piece: served.changed(with_private, partial(_only, prefix), f"serving {piece} alone")
        for piece, prefix in pieces.items()
    }


def steps_over_read(
    run: Run, task: EvaluationTask, found: Measured, bootstrap: Bootstrap, k: int
) -> dict[str, Estimate]:
    """What the private steps add to what is read, paired over users; empty without steps.

    Args:
        run: The run.
        task: The queries, with the private part.
        found: What `measure` found for the task.
        bootstrap: The settings of the intervals.
        k: Cut-off of the NDCG.

    Returns:
        ``steps_over_read_<quality>`` for the qualities log-rank and NDCG.
    """
    if not run.config.adapters.private.steps:
        return {}
    config = with_setting(run.config, "adapters.private.steps", 0)
    trainer = make_trainer(config, run.model, run.clients.histories, run.clients.store)
    reads = dataclasses.replace(run, clients=dataclasses.replace(run.clients, trainer=trainer))
    read = measure(reads, only(task, Mode.SHARED_PRIVATE, liked=None))
    quality = partial(quality_of, mode=Mode.SHARED_PRIVATE, k=k)
    return {
        f"steps_over_read_{name}": paired_difference(
            quality(found, name=name), quality(read, name=name), bootstrap
        )
        for name in RANK_QUALITIES
    }


def _only(prefix: str, own: Tensors) -> dict[str, torch.Tensor]:
    return {n: v if n.startswith(prefix) else torch.zeros_like(v) for n, v in own.items()}
