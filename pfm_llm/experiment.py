"""A whole run: config -> objects -> rounds -> evaluation -> report. The only place that wires."""

import contextlib
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm import evaluation, files, plots, run_report
from pfm_llm.assembly import Assembly, RunFolders, assemble, load_corpus
from pfm_llm.baselines import FittedBaseline, fit_baselines, parse_names
from pfm_llm.checkpoint import CheckpointStore, RunEnvironment
from pfm_llm.config import ExperimentConfig, dump_config, load_config, training_hash
from pfm_llm.data.candidates import sample_negatives
from pfm_llm.data.splits import HeldOut
from pfm_llm.errors import CheckpointError
from pfm_llm.evaluation import OUR_MODES, EvaluationTask, Measured, Ranks
from pfm_llm.export import export_shared_adapter
from pfm_llm.metrics import RANK_METRICS, per_user
from pfm_llm.metrics_log import MetricsLog
from pfm_llm.processes import Processes, start_processes
from pfm_llm.progress import Progress
from pfm_llm.rounds import Federation, resume_from, run_rounds
from pfm_llm.run_report import ResultRow
from pfm_llm.server import Server
from pfm_llm.types import Mode, SharedState

_log = logging.getLogger(__name__)
_SERVER_FOLDER = "server"
_ADAPTER_FOLDER = "shared_adapter"
_METHOD = "pfm"
_TASK = "next_item"
_HEADLINE_K = 10


def run_experiment(
    config: ExperimentConfig, resume: bool = False, from_round: int | None = None
) -> Path:
    """Train, evaluate and report.

    Args:
        config: The experiment. Its ``name`` names the run; when a run of that name exists and
            is not resumed, the next free ``<name>-<n>`` is taken, so nothing is overwritten.
        resume: Go on with the run of that name from its last commit.
        from_round: When resuming, go back to this kept commit first; later rounds are lost.

    Returns:
        The run's folder.

    Raises:
        PfmError: Something that can be said clearly went wrong; what was committed is intact.
    """
    processes = start_processes(config.runtime.threads, config.runtime.trackers, config.output.dir)
    folders = _run_folders(config, resume, processes)
    # Bad input shows before the first round; a run that never began leaves nothing.
    with contextlib.nullcontext() if resume else folders.discarded_on_failure():
        if not resume:
            _write_settings(config, folders, processes)
        corpus = load_corpus(config)
        if processes.is_main:
            _log.info("data: %s\n%s", corpus.report.describe(), corpus.split.describe())
        assembly = assemble(config, corpus, folders, processes)
        federation = make_federation(assembly, folders, processes)
        federation.server.select_cohort(1)
        parse_names(config.evaluation.baselines)
        _write_environment(assembly, folders, processes)
    first_round = resume_from(federation, from_round) if resume else 1
    processes.accelerator.init_trackers(folders.public.name)
    shared_on_call = functools.partial(_validate, federation, assembly, processes)
    started = time.perf_counter()
    run_rounds(federation, first_round, shared_on_call)
    seconds = time.perf_counter() - started
    if first_round > 1:
        _log.info("resumed at round %d: training time below is of this part alone", first_round)
    evaluate_and_report(
        assembly,
        folders,
        processes,
        federation.server.shared,
        config.federation.num_rounds,
        seconds,
    )
    processes.accelerator.end_training()
    return folders.public


def evaluate_run(run: Path) -> Path:
    """Evaluate a finished or interrupted run anew from its last commit, and rewrite its report.

    Returns:
        The run's folder.

    Raises:
        CheckpointError: Nothing was ever committed.
    """
    config = load_config(run / run_report.CONFIG_FILE)
    processes = start_processes(config.runtime.threads)
    folders = RunFolders.of(run)
    assembly = assemble(config, load_corpus(config), folders, processes)
    shared, round_number = load_shared(assembly, folders)
    evaluate_and_report(assembly, folders, processes, shared, round_number, None)
    return run


def make_federation(assembly: Assembly, folders: RunFolders, processes: Processes) -> Federation:
    """The parts of the federated loop for an assembled experiment."""
    config = assembly.config
    environment = RunEnvironment.here(
        config_hash=training_hash(config),
        contract_hash=assembly.contract.hash(),
        data_hash=assembly.corpus.interactions.content_hash(),
        num_processes=processes.count,
        tokens_per_chunk=config.runtime.tokens_per_chunk,
        device=processes.device,
    )
    return Federation(
        config=config,
        server=_new_server(assembly),
        trainer=assembly.trainer,
        store=assembly.store,
        checkpoints=CheckpointStore(folders.public / _SERVER_FOLDER),
        environment=environment,
        metrics_log=MetricsLog(folders.public / run_report.METRICS_FILE),
        processes=processes,
    )


def _new_server(assembly: Assembly) -> Server:
    """The server before round 1."""
    return Server(
        assembly.initial_shared,
        assembly.contract,
        assembly.histories.trainable,
        assembly.config.federation,
        assembly.config.seed,
    )


def load_shared(assembly: Assembly, folders: RunFolders) -> tuple[SharedState, int]:
    """The shared state of a run's last commit, and its round.

    Raises:
        CheckpointError: Nothing was ever committed.
    """
    checkpoint = CheckpointStore(folders.public / _SERVER_FOLDER).load()
    if checkpoint is None:
        raise CheckpointError(
            f"{folders.public} has no committed round; run scripts/fed_train.py --resume first"
        )
    server = _new_server(assembly)
    server.load_state_tensors(dict(checkpoint.tensors))
    return server.shared, checkpoint.round_number


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
    return EvaluationTask(
        held_out=held_out,
        negatives=sample_negatives(
            held_out, assembly.model.num_items, config.evaluation.num_negatives, config.seed
        ),
        shared=shared,
        round_number=round_number,
        parts=evaluation.parts_of(modes, config.adapters.private.weight),
        keep=keep,
    )


def measure(assembly: Assembly, processes: Processes, task: EvaluationTask) -> Measured:
    """Evaluate, each process its share of the clients; the result is equal on every process."""
    chunks = assembly.evaluator.chunks(task, assembly.config.runtime.tokens_per_chunk)
    found = []
    total = sum(map(len, chunks))
    show = Progress(total, f"evaluating on {task.held_out.name}", processes.is_main)
    with processes.together(), show as progress:
        for index, chunk in processes.share(chunks):
            found.append((index, assembly.evaluator.rank_chunk(chunk, task)))
            progress.update(min(len(chunk) * processes.count, total - progress.count))
    return evaluation.combine(processes.gather(found))


def evaluate_and_report(
    assembly: Assembly,
    folders: RunFolders,
    processes: Processes,
    shared: SharedState,
    round_number: int,
    training_seconds: float | None,
) -> None:
    """The final evaluation of every mode and baseline, and everything that a run leaves."""
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
    measured = [measure(assembly, processes, task) for task in tasks]
    with processes.together():
        if not processes.is_main:
            return
        rows = []
        baselines = _fit_baselines(assembly)
        for task, found in zip(tasks, measured, strict=True):
            rows += _rows(assembly, task, found, baselines)
        costs = _costs(assembly, folders, measured[0], training_seconds)
        costs["evaluation_seconds"] = time.perf_counter() - started
        _write_report(folders, config, rows, costs, baselines)
        _draw(folders, measured[-1])
        folder = folders.public / _ADAPTER_FOLDER
        export_shared_adapter(assembly, folder, shared, round_number, rows)


def _validate(
    federation: Federation, assembly: Assembly, processes: Processes, round_number: int
) -> Mapping[str, Any]:
    config = assembly.config
    held_out = evaluation.sample_users(
        assembly.corpus.split.validation, config.evaluation.max_users, config.seed
    )
    modes = [Mode.SHARED_ONLY]
    if config.adapters.private.enabled:
        modes.append(Mode.SHARED_PRIVATE)
    task = evaluation_task(assembly, held_out, federation.server.shared, round_number, modes)
    found = measure(assembly, processes, task)
    return {mode.value: evaluation.headline(found.ranks[mode]) for mode in modes}


def _fit_baselines(assembly: Assembly) -> list[FittedBaseline]:
    train = assembly.corpus.split.train.interactions
    return fit_baselines(
        assembly.config.evaluation.baselines,
        [train.history(user) for user in range(train.num_users)],
        assembly.model.num_items,
        assembly.corpus.split.validation,
    )


def _rows(
    assembly: Assembly,
    task: EvaluationTask,
    measured: Measured,
    baselines: Sequence[FittedBaseline],
) -> list[ResultRow]:
    config = assembly.config
    held_out, round_number = task.held_out, task.round_number
    cohort = config.federation.cohort_size
    entries: list[tuple[str, Mode, str, Ranks]] = [
        (
            baseline.name.value,
            Mode.NONE,
            "pooled data",
            evaluation.rank_baseline(baseline, held_out, task.negatives),
        )
        for baseline in baselines
    ]
    for mode, ranks in measured.ranks.items():
        trained = mode is not Mode.ZERO_SHOT
        budget = f"{round_number} rounds x {cohort} clients" if trained else "no training"
        entries.append((_METHOD, mode, budget, ranks))
    rows: list[ResultRow] = []
    for method, mode, budget, ranks in entries:
        describe = functools.partial(
            ResultRow,
            method=method,
            mode=mode.value,
            task=_TASK,
            protocol=config.data.split.value,
            budget=budget,
            split=held_out.name,
            seed=config.seed,
        )
        rows += evaluation.result_rows(ranks, describe, config.evaluation, config.seed)
    return rows


def _costs(
    assembly: Assembly,
    folders: RunFolders,
    evaluated: Measured,
    training_seconds: float | None,
) -> dict[str, Any]:
    records = MetricsLog(folders.public / run_report.METRICS_FILE).read()
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
        "shared_numbers": sum(t.numel() for t in assembly.initial_shared.tensors.values()),
    }


def _write_report(
    folders: RunFolders,
    config: ExperimentConfig,
    rows: Sequence[ResultRow],
    costs: Mapping[str, Any],
    baselines: Sequence[FittedBaseline],
) -> None:
    extra = {
        "config": config.model_dump(mode="json"),
        "environment": files.read_json(folders.public / run_report.ENVIRONMENT_FILE),
        "costs": costs,
        "baselines": {
            b.name.value: {**b.hyperparameters, "validation_ndcg@10": b.validation_ndcg}
            for b in baselines
        },
    }
    run_report.write_results(folders.public / run_report.RESULTS_FILE, rows, extra)
    tables = [
        run_report.results_table(rows, split.value, confidence=config.evaluation.confidence)
        for split in config.evaluation.splits
    ]
    files.write_text(folders.public / run_report.TABLE_FILE, "\n".join(tables))


def _draw(folders: RunFolders, measured: Measured) -> None:
    plots_folder = folders.public / run_report.PLOTS_FOLDER
    records = MetricsLog(folders.public / run_report.METRICS_FILE).read()
    plots.plot_loss(records, plots_folder / "loss.png")
    plots.plot_modes_by_round(records, plots_folder / "ndcg_by_round.png")
    if Mode.SHARED_PRIVATE in measured.ranks:
        gain = user_values(measured.ranks[Mode.SHARED_PRIVATE]) - user_values(
            measured.ranks[Mode.SHARED_ONLY]
        )
        plots.plot_user_gain(gain, plots_folder / "user_gain.png")


def user_values(ranks: Ranks, metric: str = "ndcg", k: int = _HEADLINE_K) -> np.ndarray:
    """A metric per user, float64 [users], users ascending."""
    return per_user(RANK_METRICS[metric](ranks.full, k), ranks.users)[0]


def _run_folders(config: ExperimentConfig, resume: bool, processes: Processes) -> RunFolders:
    """Of a new run, or of the run to resume; equal on every process."""
    if resume:
        return RunFolders.to_resume(config)
    folders = RunFolders.new(config)
    processes.wait()
    if folders.public.name != config.name and processes.is_main:
        _log.info("a run %s exists; this one goes to %s", config.name, folders.public)
    return folders


def _write_settings(config: ExperimentConfig, folders: RunFolders, processes: Processes) -> None:
    if processes.is_main:
        settled = config.model_copy(update={"name": folders.public.name})
        files.write_text(folders.public / run_report.CONFIG_FILE, dump_config(settled))
        files.make_private_dir(folders.private)
    processes.wait()


def _write_environment(assembly: Assembly, folders: RunFolders, processes: Processes) -> None:
    if not processes.is_main:
        return
    here = run_report.environment(
        seed=assembly.config.seed,
        dtype=str(assembly.backbone.dtype).removeprefix("torch."),
        threads=processes.threads,
        num_processes=processes.count,
        device=processes.device.type,
    )
    data = asdict(assembly.corpus.report)
    del data["examples"]  # rows of somebody's data; the run folder may be shown to anybody
    here |= {"data": data, "split": assembly.corpus.split.describe()}
    files.write_json(folders.public / run_report.ENVIRONMENT_FILE, here)
    _log.info("%d threads x %d processes, %s", processes.threads, processes.count, here["dtype"])
