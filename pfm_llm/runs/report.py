"""The end of a run: the evaluation of every mode and baseline, and the files of the run."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.evaluation import comparison, tables
from pfm_llm.evaluation.baselines.likes import FittedLikes
from pfm_llm.evaluation.baselines.selection import FittedBaseline
from pfm_llm.evaluation.evaluator import Measured
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.protocol.types import Mode
from pfm_llm.publish.export import PLOTS_FOLDER, export_shared_adapter
from pfm_llm.runs import lists, plots, summary
from pfm_llm.runs.folders import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    RunFolders,
)
from pfm_llm.runs.measuring import (
    evaluation_task,
    fit_run_baselines,
    fit_run_likes,
    gain_of,
    measure,
    rank_baselines,
    rows_of,
)
from pfm_llm.runs.publication import exported_of
from pfm_llm.runs.run import Run, Trained
from pfm_llm.runs.summary import COMPARISONS, GAINS, PRIVATE_WEIGHT

_log = logging.getLogger(__name__)


def evaluate_and_report(
    run: Run,
    trained: Trained,
    training_seconds: float | None,
    against: Sequence[Path] = (),
) -> None:
    """Evaluate every mode and baseline, and write all files of the run.

    Args:
        run: The run.
        trained: The result of training.
        training_seconds: Training time of the last start; None: nothing was trained.
        against: Result files of trained baselines, compared like the run's own baselines.
    """
    config = run.config
    started = time.perf_counter()
    splits = [run.data.split.named(name) for name in config.evaluation.splits]
    tasks = [evaluation_task(run, trained, held_out, keep=True) for held_out in splits]
    others = [comparison.read_references(against, config, one.name) for one in splits]
    measured = [measure(run, task) for task in tasks]
    with run.processes.together():
        if not run.processes.is_main:
            return
        rows: list[ResultRow] = []
        gains: list[ResultRow] = []
        comparisons: list[ResultRow] = []
        baselines, likes = fit_run_baselines(run), fit_run_likes(run)
        for task, found, other in zip(tasks, measured, others, strict=True):
            split, fitted = task.held_out.name, rank_baselines(baselines, task)
            rows += rows_of(run, task, found, fitted, likes)
            gains += comparison.gain_rows(config, split, found.ranks, found.aucs)
            references = comparison.ranked_references(fitted) + other
            comparisons += comparison.rows_over(config, split, found.ranks, references)
        costs = _costs(run, measured[0], training_seconds)
        costs["evaluation_seconds"] = time.perf_counter() - started
        extra = _extra(run, trained, _settings_of(baselines, likes)) | {"costs": costs}
        _write_report(run, rows, {GAINS: gains, COMPARISONS: comparisons}, extra)
        _draw(run.folders, measured[-1])
        exported, folder = exported_of(run, trained), run.folders.shared_adapter
        export_shared_adapter(exported, folder, trained.shared, rows)
        if config.adapters.private.enabled:
            lists.write_lists(run, trained)


def _costs(run: Run, evaluated: Measured, training_seconds: float | None) -> dict[str, Any]:
    records = MetricsLog(run.folders.public / METRICS_FILE).read()
    clients = sum(record["num_clients"] for record in records)
    local = run.config.federation.local
    return {
        "rounds": len(records),
        "client_rounds": clients,
        "shared_client_steps": clients * local.shared_local_steps,
        "private_client_steps": clients * run.clients.trainer.round_work().private_steps,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "refused_updates": sum(record["refused"] for record in records),
        "stages_in_last_round": records[-1].get("stages", {}) if records else {},
        "round_seconds": sum(record["seconds"] for record in records),
        "training_seconds_of_last_start": training_seconds,
        "personalise_client_steps": evaluated.private_steps,
        "share_of_users_with_private_adapter": evaluated.num_personalised / evaluated.num_users,
        "shared_numbers": sum(t.numel() for t in run.model.shared.tensors.values()),
    }


def _extra(
    run: Run, trained: Trained, baselines: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The entries of ``results.json`` beside the measured rows."""
    found: dict[str, Any] = {
        "config": run.config.model_dump(mode="json"),
        "environment": files.read_json(run.folders.public / ENVIRONMENT_FILE),
        "baselines": baselines,
    }
    if run.config.adapters.private.enabled:
        found[PRIVATE_WEIGHT] = trained.private_weight
    return found


def _settings_of(
    baselines: Sequence[FittedBaseline], likes: Sequence[FittedLikes]
) -> dict[str, dict[str, float]]:
    """The chosen settings of each baseline, and its quality on validation."""
    ranked = {
        b.name.value: {**b.hyperparameters, "validation_ndcg@10": b.validation_ndcg}
        for b in baselines
    }
    judged = (one for one in likes if not math.isnan(one.validation_auc))
    return ranked | {
        one.name: {**one.hyperparameters, "validation_auc": one.validation_auc} for one in judged
    }


def _write_report(
    run: Run,
    rows: Sequence[ResultRow],
    differences: Mapping[str, Sequence[ResultRow]],
    extra: Mapping[str, Any],
) -> None:
    as_trees = {key: list(map(dataclasses.asdict, found)) for key, found in differences.items()}
    write_results(run.folders.public / RESULTS_FILE, rows, {**as_trees, **extra})
    evaluated = run.config.evaluation
    texts = [
        tables.results_table(rows, split.value, confidence=evaluated.confidence)
        for split in evaluated.splits
    ]
    paired = [row for found in differences.values() for row in found]
    texts.append(summary.differences_table(paired, evaluated.confidence))
    files.write_text(run.folders.public / TABLE_FILE, "\n".join(texts))


def _draw(folders: RunFolders, measured: Measured) -> None:
    plots_folder = folders.public / PLOTS_FOLDER
    records = MetricsLog(folders.public / METRICS_FILE).read()
    plots.plot_loss(records, plots_folder / "loss.png")
    plots.plot_modes_by_round(records, plots_folder / "ndcg_by_round.png")
    if Mode.SHARED_PRIVATE in measured.ranks:
        plots.plot_user_gain(gain_of(measured, "ndcg"), plots_folder / "user_gain.png")
