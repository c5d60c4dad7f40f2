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
from pfm_llm.config.choices import HeldOutSplit, Task
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.config.settle import known
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import comparison, tables
from pfm_llm.evaluation.baselines.likes import FittedLikes
from pfm_llm.evaluation.baselines.selection import FittedBaseline
from pfm_llm.evaluation.evaluator import EvaluationTask, Measured
from pfm_llm.evaluation.openings import OPENINGS
from pfm_llm.evaluation.ranked import write_ranked
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.evaluation.results import SHARED_WITH, ResultRow, write_results
from pfm_llm.protocol.types import Mode
from pfm_llm.publish.export import PLOTS_FOLDER, export_shared_adapter
from pfm_llm.runs import lists, plots, summary
from pfm_llm.runs.checks.process import peak_memory
from pfm_llm.runs.folders import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
)
from pfm_llm.runs.loss_plot import LossScale, plot_loss
from pfm_llm.runs.measuring import (
    count_test,
    evaluation_task,
    fit_run_baselines,
    fit_run_likes,
    gain_of,
    measure,
    mode_rows,
    rank_baselines,
    rows_of,
)
from pfm_llm.runs.publication import exported_of
from pfm_llm.runs.run import Run, Trained
from pfm_llm.runs.study.pieces import serve_pieces
from pfm_llm.runs.study.served import Served
from pfm_llm.runs.summary import COMPARISONS, GAINS, PRIVATE_WEIGHT

_log = logging.getLogger(__name__)


def evaluate_and_report(
    run: Run,
    trained: Trained,
    training_seconds: float | None,
    against: Sequence[Path] = (),
    ranked: Path | None = None,
) -> None:
    """Evaluate every mode and baseline, and write all files of the run.

    Args:
        run: The run.
        trained: The result of training.
        training_seconds: Training time of the last start; None: nothing was trained.
        against: Result files of trained baselines, compared like the run's own baselines.
        ranked: A folder for the ranked lists of the users; None: they are not written.
    """
    config = run.config
    started, k = time.perf_counter(), headline_k(config.evaluation.ks)
    splits = [run.data.split.named(name) for name in config.evaluation.splits]
    tasks = [_task(run, trained, held_out, ranked) for held_out in splits]
    others = [comparison.read_references(against, config, one.name) for one in splits]
    opened = _count_test(run)
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
            rows += rows_of(run, task, found, fitted, likes) + _piece_rows(run, task)
            gains += comparison.gain_rows(config, split, found.ranks, found.aucs)
            references = comparison.ranked_references(fitted, k) + other
            comparisons += comparison.rows_over(config, split, found.ranks, references)
            if ranked:
                _write_ranked(run, ranked, task.held_out, {**fitted, **found.ranks})
        costs = _costs(run, trained, measured[0], training_seconds)
        costs["evaluation_seconds"] = time.perf_counter() - started
        exported = exported_of(run, trained)
        extra = _extra(run, trained, _settings_of(baselines, likes)) | opened | {"costs": costs}
        extra |= summary.as_entry(exported.privacy)
        _write_report(run, rows, {GAINS: gains, COMPARISONS: comparisons}, extra)
        _draw(run, measured[-1])
        folder = run.folders.shared_adapter
        export_shared_adapter(exported, folder, trained.shared, rows)
        if config.adapters.private.enabled:
            lists.write_lists(run, trained)


def _count_test(run: Run) -> dict[str, Any]:
    """The count of test measurements as an entry of the results; empty without the test split."""
    if HeldOutSplit.TEST not in run.config.evaluation.splits:
        return {}
    return {OPENINGS: count_test(run)}


def _task(run: Run, trained: Trained, held_out: HeldOut, ranked: Path | None) -> EvaluationTask:
    """Every mode on a split; its lists hold what the longest cut-off reads."""
    task = evaluation_task(run, trained, held_out, keep=True)
    return dataclasses.replace(task, depth=max(run.config.evaluation.ks)) if ranked else task


def _piece_rows(run: Run, task: EvaluationTask) -> list[ResultRow]:
    """Rows of the shared part with one piece of the private part, where it has several.

    Their mode is `SHARED_WITH` and the name of the piece.
    """
    if not task.uses_private:
        return []
    found = serve_pieces(Served(run, task), task, run.model.private.pieces)
    ranks = {f"{SHARED_WITH}{name}": own.ranks[Mode.SHARED_PRIVATE] for name, own in found.items()}
    return mode_rows(run, task, ranks)


def _write_ranked(run: Run, folder: Path, held_out: HeldOut, ranks: Mapping[Any, Ranks]) -> None:
    data, of_split = run.data.interactions, folder / held_out.name
    named = {str(name): own for name, own in ranks.items()}
    write_ranked(of_split, held_out, named, data.user_ids, data.catalogue.item_ids)


def _costs(
    run: Run, trained: Trained, evaluated: Measured, training_seconds: float | None
) -> dict[str, Any]:
    log = MetricsLog(run.folders.public / METRICS_FILE)
    records = log.read(trained.shared.round_number)
    clients = log.total("num_clients", records)
    local = run.config.federation.local
    return {
        "rounds": len(records),
        "client_rounds": clients,
        "shared_client_steps": clients * local.shared_local_steps,
        "private_client_steps": clients * run.clients.trainer.round_work().private_steps,
        "bytes_up": log.total("bytes_up", records),
        "bytes_down": log.total("bytes_down", records),
        "refused_updates": log.total("refused", records),
        "refused_by_reason": summary.refused_by_reason(records),
        "stages_in_last_round": records[-1].get("stages", {}) if records else {},
        "round_seconds": log.total("seconds", records),
        "training_seconds_of_last_start": training_seconds,
        "personalise_client_steps": evaluated.private_steps,
        "share_of_users_with_private_adapter": evaluated.num_personalised / evaluated.num_users,
        "peak_memory_bytes": peak_memory(),
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
        tables.results_table(rows, split.value, evaluated.confidence, evaluated.ks)
        for split in evaluated.splits
    ]
    paired = [row for found in differences.values() for row in found]
    texts.append(summary.differences_table(paired, evaluated.confidence))
    files.write_text(run.folders.public / TABLE_FILE, "\n".join(texts))


def _loss_scale(run: Run) -> LossScale:
    config, clients = run.config, len(run.clients.histories.trainable)
    private = run.model.model.objective.private
    adds_scores = config.adapters.private.enabled and not private.takes_steps
    return LossScale(
        num_items=run.model.model.num_items,
        num_terms=1 + adds_scores,
        has_likes=Task.LIKE in config.tasks,
        rounds_per_pass=clients / known(config.federation.cohort_size),
    )


def _draw(run: Run, measured: Measured) -> None:
    plots_folder = run.folders.public / PLOTS_FOLDER
    records = MetricsLog(run.folders.public / METRICS_FILE).read()
    k = headline_k(run.config.evaluation.ks)
    plot_loss(records, plots_folder / "loss.png", _loss_scale(run))
    plots.plot_modes_by_round(records, plots_folder / "ndcg_by_round.png", k)
    if Mode.SHARED_PRIVATE in measured.ranks:
        gains = gain_of(measured, "ndcg", k)
        plots.plot_user_gain(gains, plots_folder / "user_gain.png", k)
