"""Measuring a run: its modes and its baselines on a split, and the rows of results."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Task
from pfm_llm.config.cut_offs import HEADLINE_K
from pfm_llm.config.schema import training_hash
from pfm_llm.config.settings import like_threshold
from pfm_llm.config.settle import known
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import evaluator, ranking
from pfm_llm.evaluation.baselines.likes import (
    LIKE_RATE,
    LIKE_RIDGE,
    FittedLikes,
    fit_like_baselines,
)
from pfm_llm.evaluation.baselines.selection import FittedBaseline, fit_baselines
from pfm_llm.evaluation.candidates import sample_negatives
from pfm_llm.evaluation.evaluator import OUR_MODES, EvaluationTask, Measured
from pfm_llm.evaluation.openings import OPENINGS_FILE, count_opening
from pfm_llm.evaluation.personality.estimates import user_quality
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.run import Run, Trained

_POOLED = "pooled data"
_WITHOUT_PRIVATE = (Mode.ZERO_SHOT, Mode.SHARED_ONLY)


def evaluation_task(
    run: Run,
    trained: Trained,
    held_out: HeldOut,
    modes: Sequence[Mode] = OUR_MODES,
    keep: bool = False,
) -> EvaluationTask:
    """The task for `measure`: our modes on a split; see `EvaluationTask`.

    Modes with a private part are left out if the run has no private part.
    """
    config = run.config
    threshold = like_threshold(config)
    if not config.adapters.private.enabled:
        modes = [mode for mode in modes if mode in _WITHOUT_PRIVATE]
    num_items = len(run.data.interactions.catalogue)
    return EvaluationTask(
        held_out=held_out,
        negatives=sample_negatives(
            held_out, num_items, config.evaluation.num_negatives, config.seed
        ),
        shared=trained.shared,
        parts=evaluator.parts_of(modes, trained.private_weight),
        keep=keep,
        liked=None if threshold is None else held_out.liked(threshold),
    )


def validation_task(run: Run, trained: Trained, modes: Sequence[Mode]) -> EvaluationTask:
    """`evaluation_task` on the sample of validation users that is used for choices."""
    config = run.config
    held_out = evaluator.sample_users(
        run.data.split.validation, config.evaluation.max_users, config.seed
    )
    return evaluation_task(run, trained, held_out, modes)


def only(task: EvaluationTask, *modes: Mode, **changes: Any) -> EvaluationTask:
    """A task with only some of its modes, which stores no private states.

    Args:
        task: The task.
        modes: Some of the task's modes.
        changes: Other fields of the new task.
    """
    parts = {mode: task.parts[mode] for mode in modes}
    return dataclasses.replace(task, parts=parts, keep=False, **changes)


def measure(
    run: Run,
    task: EvaluationTask,
    known: UserVectors | None = None,
) -> Measured:
    """Evaluate; each process takes its share of the clients, and all get the same result.

    Args:
        run: The run.
        task: What to rank with what.
        known: User vectors that earlier calls on this split and shared state have read out; see
            `Scorer.score`.
    """
    processes = run.processes
    chunks = run.evaluator.chunks(task, run.config.runtime.tokens_per_chunk)
    found = []
    total = len(task.held_out.users)
    show = Progress(total, f"evaluating on {task.held_out.name}", processes.is_main, unit="users")
    with processes.together(), show as progress:
        for index, chunk in processes.share(chunks):
            measured = run.evaluator.rank_chunk(chunk, task, None, known)
            found.append((index, measured))
            # A silo has many users, so its work is counted by them. The other processes do as much.
            done = len(measured.users) * processes.count
            progress.update(min(done, total - progress.count))
    return evaluator.combine(processes.gather(found))


def quality_of(
    measured: Measured, mode: Mode, name: str = "log_rank", k: int = HEADLINE_K
) -> np.ndarray:
    """A quality of `personality.user_quality` per user, float64 [U], users ascending."""
    ranks = measured.ranks[mode]
    return user_quality(name, ranks.full, ranks.users, k)


def gain_of(measured: Measured, name: str = "log_rank", k: int = HEADLINE_K) -> np.ndarray:
    """The gain of each user from the private part in a quality, float64 [U]; see `quality_of`."""
    own, shared = (
        quality_of(measured, mode, name, k) for mode in (Mode.SHARED_PRIVATE, Mode.SHARED_ONLY)
    )
    return np.subtract(own, shared)


def count_test(run: Run, file: Path | None = None) -> dict[str, Any]:
    """Count a measurement of the test split for a run and its baselines, before it begins.

    Args:
        run: The run.
        file: The file of the counts; None: the one beside the run's folder.

    Returns:
        See `count_opening`; empty on a process that is not the main one.

    Raises:
        CorruptFileError, StorageError: See `count_opening`.
    """
    config = run.config
    baselines = list(config.evaluation.baselines)
    if baselines and like_threshold(config) is not None:
        baselines += [LIKE_RATE, LIKE_RIDGE]
    methods = dict.fromkeys(baselines, "chosen on validation")
    methods[config.method.value] = training_hash(config)[:16]
    file = file or run.folders.public.with_name(OPENINGS_FILE)
    with run.processes.together():
        if not run.processes.is_main:
            return {}
        return count_opening(file, run.data.interactions, run.data.split, methods)


def fit_run_baselines(run: Run) -> list[FittedBaseline]:
    """The config's baselines, fitted on train and chosen on validation."""
    train = run.data.split.train.interactions
    return fit_baselines(
        run.config.evaluation.baselines,
        [train.history(user) for user in range(train.num_users)],
        len(train.catalogue),
        run.data.split.validation,
    )


def fit_run_likes(run: Run) -> list[FittedLikes]:
    """The baselines of likes; none without the task ``like`` or without baselines in the config."""
    threshold = like_threshold(run.config)
    if threshold is None or not run.config.evaluation.baselines:
        return []
    texts = run.model.model.item_texts.cpu().numpy()
    return fit_like_baselines(run.data.split, threshold, texts)


def rank_baselines(baselines: Sequence[FittedBaseline], task: EvaluationTask) -> dict[str, Ranks]:
    """Name of each baseline to its ranks of the task's targets."""
    return {
        baseline.name.value: ranking.rank_baseline(
            baseline, task.held_out, task.negatives, task.depth
        )
        for baseline in baselines
    }


def rows_of(
    run: Run,
    task: EvaluationTask,
    measured: Measured,
    baselines: Mapping[str, Ranks],
    likes: Sequence[FittedLikes] = (),
) -> list[ResultRow]:
    """Rows for ``results.json``: those of the baselines, and those of every measured mode."""
    config, held_out = run.config, task.held_out
    rows: list[ResultRow] = []
    pooled = functools.partial(_row(run, task), mode=Mode.NONE.value, budget=_POOLED)
    for name, ranks in baselines.items():
        describe = functools.partial(pooled, method=name, task=Task.NEXT_ITEM.value)
        rows += ranking.result_rows(ranks, describe, config.evaluation, config.seed)
    if task.liked is not None:
        for fitted in likes:
            like = functools.partial(pooled, method=fitted.name, task=Task.LIKE.value)
            aucs = fitted.aucs(held_out, task.liked)
            rows.append(ranking.auc_row(aucs, like, config.evaluation, config.seed))
    return rows + mode_rows(run, task, measured.ranks, measured.aucs)


def mode_rows(
    run: Run,
    task: EvaluationTask,
    ranks: Mapping[Any, Ranks],
    aucs: Mapping[Any, np.ndarray] = MappingProxyType({}),
) -> list[ResultRow]:
    """Rows of our model, by what scores.

    Args:
        run: The run.
        task: The queries and the shared state.
        ranks: Mode, or another name of what scores, to its ranks.
        aucs: The same to the AUC of each user, float64 [U], where likes were asked for.
    """
    config, rows = run.config, []
    cohort = known(config.federation.cohort_size)
    for mode, own in ranks.items():
        trained = mode != Mode.ZERO_SHOT
        budget = f"{task.shared.round_number} rounds x {cohort} clients"
        describe = functools.partial(
            _row(run, task),
            method=config.method.value,
            mode=str(mode),
            budget=budget if trained else "no training",
            regime=(config.regime or "") if trained else "",
        )
        next_item = functools.partial(describe, task=Task.NEXT_ITEM.value)
        rows += ranking.result_rows(own, next_item, config.evaluation, config.seed)
        if mode in aucs:
            like = functools.partial(describe, task=Task.LIKE.value)
            rows.append(ranking.auc_row(aucs[mode], like, config.evaluation, config.seed))
    return rows


def _row(run: Run, task: EvaluationTask) -> functools.partial[ResultRow]:
    """A row with the circumstances that all rows of a task share."""
    config, split = run.config, task.held_out.name
    return functools.partial(
        ResultRow, protocol=config.data.split.value, split=split, seed=config.seed
    )
