"""The end of a run: every mode and baseline measured, and everything that a run leaves."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.runs import plots
from pfm_llm.runs.run import Assembly
from pfm_llm.base import files
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import like_threshold, method_name
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import comparison, personality, ranking
from pfm_llm.evaluation import evaluator
from pfm_llm.evaluation import tables
from pfm_llm.evaluation.baselines import (
    FittedBaseline,
    FittedLikes,
    fit_baselines,
    fit_like_baselines,
)
from pfm_llm.evaluation.candidates import sample_negatives
from pfm_llm.evaluation.evaluator import OUR_MODES, EvaluationTask, Measured, UserVectors
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.runs.folders import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    RunFolders,
)
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.publish.artefact import Parent
from pfm_llm.publish.export import PLOTS_FOLDER, Exported, export_shared_adapter, trained_from

COMPARISONS = "comparisons"
"""Key of ``results.json``: rows of differences, as `comparison.rows_over` makes them."""
_POOLED = "pooled data"


def evaluation_task(
    assembly: Assembly,
    held_out: HeldOut,
    shared: SharedState,
    round_number: int,
    modes: Sequence[Mode] = OUR_MODES,
    keep: bool = False,
) -> EvaluationTask:
    """What `measure` takes: our modes on a split; see `EvaluationTask`."""
    config = assembly.config
    threshold = like_threshold(config)
    return EvaluationTask(
        held_out=held_out,
        negatives=sample_negatives(
            held_out, assembly.parts.model.num_items, config.evaluation.num_negatives, config.seed
        ),
        shared=shared,
        round_number=round_number,
        parts=evaluator.parts_of(modes, config.adapters.private.weight),
        keep=keep,
        liked=None if threshold is None else held_out.liked(threshold),
    )


def validation_task(
    assembly: Assembly, shared: SharedState, round_number: int, modes: Sequence[Mode]
) -> EvaluationTask:
    """`evaluation_task` on the sample of validation that choices are made on."""
    config = assembly.config
    held_out = evaluator.sample_users(
        assembly.corpus.split.validation, config.evaluation.max_users, config.seed
    )
    return evaluation_task(assembly, held_out, shared, round_number, modes)


def measure(
    assembly: Assembly,
    processes: Processes,
    task: EvaluationTask,
    known: MutableMapping[tuple[str, ...], UserVectors] | None = None,
) -> Measured:
    """Evaluate, each process its share of the clients; the result is equal on every process.

    Args:
        assembly: The run's objects.
        processes: Who works on it.
        task: What to rank with what.
        known: By chunk, what earlier calls on the same split and shared state have read out.
    """
    chunks = assembly.evaluator.chunks(task, assembly.config.runtime.tokens_per_chunk)
    found = []
    total = sum(map(len, chunks))
    show = Progress(total, f"evaluating on {task.held_out.name}", processes.is_main)
    with processes.together(), show as progress:
        for index, chunk in processes.share(chunks):
            read = None if known is None else known[chunk]
            found.append((index, assembly.evaluator.rank_chunk(chunk, task, None, read)))
            progress.update(min(len(chunk) * processes.count, total - progress.count))
    return evaluator.combine(processes.gather(found))


def evaluate_and_report(
    assembly: Assembly,
    folders: RunFolders,
    processes: Processes,
    shared: SharedState,
    round_number: int,
    training_seconds: float | None,
    against: Sequence[Path] = (),
) -> None:
    """The final evaluation of every mode and baseline, and everything that a run leaves.

    Args:
        assembly: The run's objects.
        folders: Where it is.
        processes: Who works on it.
        shared: The shared state at hand.
        round_number: After which round it stands.
        training_seconds: Of the last start; None: nothing was trained.
        against: Result files of trained baselines, to be compared with as the run's own are.
    """
    config = assembly.config
    modes = [
        mode
        for mode in OUR_MODES
        if config.adapters.private.enabled or mode in (Mode.ZERO_SHOT, Mode.SHARED_ONLY)
    ]
    started = time.perf_counter()
    splits = [getattr(assembly.corpus.split, name.value) for name in config.evaluation.splits]
    tasks = [
        evaluation_task(assembly, held_out, shared, round_number, modes, keep=True)
        for held_out in splits
    ]
    others = [comparison.read_references(against, config, one.name) for one in splits]
    measured = [measure(assembly, processes, task) for task in tasks]
    with processes.together():
        if not processes.is_main:
            return
        rows: list[ResultRow] = []
        comparisons: list[ResultRow] = []
        baselines, likes = fit_run_baselines(assembly), fit_run_likes(assembly)
        for task, found, trained in zip(tasks, measured, others, strict=True):
            fitted = rank_baselines(baselines, task)
            rows += rows_of(assembly, task, found, fitted, likes)
            references = comparison.ranked_references(fitted) + trained
            comparisons += comparison.rows_over(config, task.held_out.name, found.ranks, references)
        costs = _costs(assembly, folders, measured[0], training_seconds)
        costs["evaluation_seconds"] = time.perf_counter() - started
        _write_report(folders, config, rows, comparisons, costs, _settings_of(baselines, likes))
        _draw(folders, measured[-1])
        folder = folders.shared_adapter
        export_shared_adapter(exported_model(assembly), folder, shared, round_number, rows)


def exported_model(assembly: Assembly) -> Exported:
    """What `export_shared_adapter` takes of a run."""
    artefact, started = assembly.artefact, assembly.config.init_from
    parents: tuple[Parent, ...] = ()
    if artefact is not None and started is not None:
        parents = (trained_from(artefact, started.adapter, started.revision),)
    catalogue = assembly.corpus.interactions.catalogue
    return Exported(assembly.config, assembly.parts, catalogue, parents)


def fit_run_baselines(assembly: Assembly) -> list[FittedBaseline]:
    """The config's baselines, fitted on train and chosen on validation."""
    train = assembly.corpus.split.train.interactions
    return fit_baselines(
        assembly.config.evaluation.baselines,
        [train.history(user) for user in range(train.num_users)],
        assembly.parts.model.num_items,
        assembly.corpus.split.validation,
    )


def fit_run_likes(assembly: Assembly) -> list[FittedLikes]:
    """The baselines of likes; none without the task ``like``, or where the config has none."""
    config = assembly.config
    threshold = like_threshold(config)
    if threshold is None or not config.evaluation.baselines:
        return []
    texts = assembly.parts.model.item_texts.cpu().numpy()
    return fit_like_baselines(assembly.corpus.split, threshold, texts)


def rank_baselines(baselines: Sequence[FittedBaseline], task: EvaluationTask) -> dict[str, Ranks]:
    """Name of each baseline to its ranks of the task's targets."""
    return {
        baseline.name.value: ranking.rank_baseline(baseline, task.held_out, task.negatives)
        for baseline in baselines
    }


def rows_of(
    assembly: Assembly,
    task: EvaluationTask,
    measured: Measured,
    baselines: Mapping[str, Ranks],
    likes: Sequence[FittedLikes] = (),
) -> list[ResultRow]:
    """Rows for ``results.json``: of the baselines, and of every mode that was measured."""
    config = assembly.config
    held_out, round_number = task.held_out, task.round_number
    cohort = config.federation.cohort_size
    circumstances = functools.partial(
        ResultRow, protocol=config.data.split.value, split=held_out.name, seed=config.seed
    )
    rows: list[ResultRow] = []
    pooled = functools.partial(circumstances, mode=Mode.NONE.value, budget=_POOLED)
    for name, ranks in baselines.items():
        describe = functools.partial(pooled, method=name, task=Task.NEXT_ITEM.value)
        rows += ranking.result_rows(ranks, describe, config.evaluation, config.seed)
    if task.liked is not None:
        for fitted in likes:
            like = functools.partial(pooled, method=fitted.name, task=Task.LIKE.value)
            aucs = fitted.aucs(held_out, task.liked)
            rows.append(ranking.auc_row(aucs, like, config.evaluation, config.seed))
    for mode, ranks in measured.ranks.items():
        trained = mode is not Mode.ZERO_SHOT
        describe = functools.partial(
            circumstances,
            method=method_name(config),
            mode=mode.value,
            budget=f"{round_number} rounds x {cohort} clients" if trained else "no training",
            regime=(config.regime or "") if trained else "",
        )
        next_item = functools.partial(describe, task=Task.NEXT_ITEM.value)
        rows += ranking.result_rows(ranks, next_item, config.evaluation, config.seed)
        if mode in measured.aucs:
            like = functools.partial(describe, task=Task.LIKE.value)
            aucs = measured.aucs[mode]
            rows.append(ranking.auc_row(aucs, like, config.evaluation, config.seed))
    return rows


def _costs(
    assembly: Assembly,
    folders: RunFolders,
    evaluated: Measured,
    training_seconds: float | None,
) -> dict[str, Any]:
    records = MetricsLog(folders.public / METRICS_FILE).read()
    clients = sum(record["num_clients"] for record in records)
    local = assembly.config.federation.local
    return {
        "rounds": len(records),
        "client_rounds": clients,
        "shared_client_steps": clients * local.shared_local_steps,
        "private_client_steps": clients * assembly.trainer.round_work().private_steps,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "refused_updates": sum(record["refused"] for record in records),
        "round_seconds": sum(record["seconds"] for record in records),
        "training_seconds_of_last_start": training_seconds,
        "personalise_client_steps": evaluated.private_steps,
        "share_of_users_with_private_adapter": evaluated.num_personalised / evaluated.num_users,
        "shared_numbers": sum(t.numel() for t in assembly.parts.shared.tensors.values()),
    }


def _write_report(
    folders: RunFolders,
    config: ExperimentConfig,
    rows: Sequence[ResultRow],
    comparisons: Sequence[ResultRow],
    costs: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    extra = {
        COMPARISONS: [dataclasses.asdict(row) for row in comparisons],
        "config": config.model_dump(mode="json"),
        "environment": files.read_json(folders.public / ENVIRONMENT_FILE),
        "costs": costs,
        "baselines": baselines,
    }
    write_results(folders.public / RESULTS_FILE, rows, extra)
    texts = [
        tables.results_table(rows, split.value, confidence=config.evaluation.confidence)
        for split in config.evaluation.splits
    ]
    files.write_text(folders.public / TABLE_FILE, "\n".join(texts))


def _settings_of(
    baselines: Sequence[FittedBaseline], likes: Sequence[FittedLikes]
) -> dict[str, dict[str, float]]:
    """What was chosen on validation for each baseline, and how good it was there."""
    ranked = {
        b.name.value: {**b.hyperparameters, "validation_ndcg@10": b.validation_ndcg}
        for b in baselines
    }
    judged = (one for one in likes if not math.isnan(one.validation_auc))
    return ranked | {
        one.name: {**one.hyperparameters, "validation_auc": one.validation_auc} for one in judged
    }


def _draw(folders: RunFolders, measured: Measured) -> None:
    plots_folder = folders.public / PLOTS_FOLDER
    records = MetricsLog(folders.public / METRICS_FILE).read()
    plots.plot_loss(records, plots_folder / "loss.png")
    plots.plot_modes_by_round(records, plots_folder / "ndcg_by_round.png")
    if Mode.SHARED_PRIVATE in measured.ranks:
        own, shared = (
            personality.user_quality("ndcg", measured.ranks[mode].full, measured.ranks[mode].users)
            for mode in (Mode.SHARED_PRIVATE, Mode.SHARED_ONLY)
        )
        plots.plot_user_gain(own - shared, plots_folder / "user_gain.png")
