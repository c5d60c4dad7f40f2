"""A whole run: config -> objects -> rounds -> evaluation -> report."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.errors import ConfigError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes, log_to_trackers, start_processes
from pfm_llm.config.choices import Aggregation, ServerOptimizer
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.config.schema import ExperimentConfig, dump_config, training_hash
from pfm_llm.config.settings import leaves
from pfm_llm.evaluation import ranking
from pfm_llm.evaluation.results import ResultRow, read_results
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.federation.rounds import Federation, resume_from, run_rounds
from pfm_llm.protocol.types import Mode
from pfm_llm.publish import hub
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.publish.versions.restore import copy_artefact
from pfm_llm.runs.checks.memory import MemoryEstimate
from pfm_llm.runs.checks.plan import check_disk, check_memory, check_plan, warn_of_easy_figures
from pfm_llm.runs.environment import environment_of
from pfm_llm.runs.folders import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    RunFolders,
)
from pfm_llm.runs.measuring import measure, validation_task
from pfm_llm.runs.opening import TrainedOn, corpus_to_resume, run_in_work
from pfm_llm.runs.private_weight import choose_weight
from pfm_llm.runs.publication import push_finished, push_when_due
from pfm_llm.runs.report import evaluate_and_report
from pfm_llm.runs.run import Run, Trained, assemble, load_corpus, settled
from pfm_llm.runs.summary import COMPARISONS, GAINS
from pfm_llm.server.checkpoint import RunEnvironment

_log = logging.getLogger(__name__)


def run_experiment(
    config: ExperimentConfig, resume: bool = False, from_round: int | None = None
) -> Path:
    """Train, evaluate and report.

    Args:
        config: The experiment. Its ``name`` names the run. If a run of that name exists and is not
            resumed, the new run is called ``<name>-<n>``, so no run is overwritten.
        resume: Continue the run of that name from its last commit.
        from_round: When resuming, go back to this kept commit first; later rounds are lost.

    Returns:
        The run's folder.

    Raises:
        PfmError: Any error with a clear message; committed rounds are intact.
    """
    processes = start_processes(config.runtime.threads, config.runtime.trackers, config.output.dir)
    claim = RunFolders.to_resume(config) if resume else RunFolders.claimed(config)
    with processes.main_holds(claim) as folders:
        if folders.public.name != config.name and processes.is_main:
            _log.info("a run %s exists; this one goes to %s", config.name, folders.public)
        run = _started(config, resume, folders, processes)
        _train_and_report(run, resume, from_round)
    return folders.public


def evaluate_run(folder: Path, against: Sequence[Path] = (), ranked: Path | None = None) -> Path:
    """Evaluate a finished or interrupted run anew from its last commit, and rewrite its report.

    Args:
        folder: The run's folder.
        against: Result files of trained baselines, for paired differences over users.
        ranked: A folder for the ranked list of each user, see `write_ranked`; None: none is
            written.

    Returns:
        The run's folder.

    Raises:
        ConfigError: There is no such run.
        CheckpointError: The run has no committed round.
        BusyError: Another process trains or measures the run.
        ConfigError: ``ranked`` is in the run's public folder.
        DataError: A file of ``against`` belongs to other data, or has no figures per user.
    """
    if ranked and ranked.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{ranked} is in the run's public folder, and a ranked list is somebody's; give "
            "another folder, or none for the run's private one"
        )
    with run_in_work(folder) as (run, trained):
        evaluate_and_report(run, trained, None, against, ranked)
    return folder


def make_federation(run: Run) -> Federation:
    """The objects of the federated loop, before round 1."""
    config, processes = run.config, run.processes
    environment = RunEnvironment.here(
        config_hash=training_hash(config),
        contract_hash=run.model.contract.hash(),
        data_hash=run.data.interactions.content_hash(),
        num_processes=processes.count,
        tokens_per_chunk=config.runtime.tokens_per_chunk,
        device=processes.device,
    )
    server, clients, settings = run.new_server(), run.clients, config.federation.server
    averages = settings.optimizer is not ServerOptimizer.FEDADAM
    sees_updates = settings.aggregator is Aggregation.MEAN and not server.is_masked
    measure_error = averages and sees_updates
    return Federation(
        config=config,
        server=server,
        exchange=LocalExchange(
            server, clients.trainer, clients.store, processes, measure_error, clients.cache
        ),
        checkpoints=run.checkpoints,
        environment=environment,
        metrics_log=MetricsLog(run.folders.public / METRICS_FILE),
        processes=processes,
    )


def _validate(run: Run, trained: Trained) -> Mapping[str, Any]:
    task = validation_task(run, trained, [Mode.SHARED_ONLY, Mode.SHARED_PRIVATE])
    found = measure(run, dataclasses.replace(task, losses=True))
    k = headline_k(run.config.evaluation.ks)
    return {
        mode.value: ranking.headline(ranks, k) | found.losses(mode)
        for mode, ranks in found.ranks.items()
    }


def _tracked_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Dotted key to value of each setting; a list is text, since trackers take plain values."""
    found = leaves(config.model_dump(mode="json"))
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in found.items()}


def _track_results(run: Run, round_number: int) -> None:
    """Send every figure of ``results.json`` to the trackers."""
    with run.processes.together():
        if not run.processes.is_main:
            return
        rows, extra = read_results(run.folders.public / RESULTS_FILE)
        rows += [ResultRow(**row) for key in (GAINS, COMPARISONS) for row in extra[key]]
        figures = {row.label: row.value for row in rows}
        values = {"results": figures, "costs": extra["costs"]}
        log_to_trackers(run.processes, values, round_number)


def _started(
    config: ExperimentConfig, resume: bool, folders: RunFolders, processes: Processes
) -> Run:
    """The objects of a run; whatever can be wrong with its input is found here."""
    if resume:
        folders.check_settings(config)
    data = corpus_to_resume(config, folders) if resume else load_corpus(config)
    if processes.is_main:
        _log.info("data: %s\n%s", data.report.describe(), data.split.describe())
    config = settled(config, data)
    check_plan(config, data)
    if processes.is_main:
        warn_of_easy_figures(config, data)
    memory = check_memory(config, data, processes)
    if not resume:
        _write_settings(config, folders, processes)
        _fetch_initial_adapter(config, folders, processes)
    artefact = read_artefact(folders.initial_adapter) if config.init_from else None
    run = assemble(config, data, folders, processes, artefact)
    check_disk(run)
    _write_environment(run, memory)
    return run


def _train_and_report(run: Run, resume: bool, from_round: int | None) -> None:
    federation, processes = make_federation(run), run.processes
    first_round = resume_from(federation, from_round) if resume else 1
    processes.accelerator.init_trackers(run.folders.public.name, _tracked_settings(run.config))
    server = federation.server
    started = time.perf_counter()
    run_rounds(
        federation,
        first_round,
        validate=lambda: _validate(run, run.as_set(server.shared)),
        on_commit=lambda _: push_when_due(run, server.shared),
    )
    seconds = time.perf_counter() - started
    if first_round > 1:
        _log.info("resumed at round %d: training time below is of this part alone", first_round)
    evaluate_and_report(run, choose_weight(run, server.shared), seconds)
    _track_results(run, server.shared.round_number)
    push_finished(run)
    processes.accelerator.end_training()


def _write_settings(config: ExperimentConfig, folders: RunFolders, processes: Processes) -> None:
    if processes.is_main:
        settled = config.model_copy(update={"name": folders.public.name})
        files.write_text(folders.public / CONFIG_FILE, dump_config(settled))
    processes.wait()


def _write_environment(run: Run, memory: MemoryEstimate | None) -> None:
    processes = run.processes
    if not processes.is_main:
        return
    here = environment_of(run)
    data = dataclasses.asdict(run.data.report)
    del data["examples"]  # rows of the user's data do not belong in a folder that may be public
    here |= {"data": data, "split": run.data.split.describe()}
    if memory is not None:
        here["memory"] = memory.as_json()
    here["num_clients"] = len(run.clients.histories.trainable)
    TrainedOn.of(run).write(run.folders)
    files.write_json(run.folders.public / ENVIRONMENT_FILE, here)  # now the run has begun
    _log.info("%d threads x %d processes, %s", processes.threads, processes.count, here["dtype"])


def _fetch_initial_adapter(
    config: ExperimentConfig, folders: RunFolders, processes: Processes
) -> None:
    """Copy the initial adapter into the run, which then needs neither the Hub nor its folder."""
    if config.init_from is None:
        return
    with processes.together():
        if not processes.is_main:
            return
        artefact = hub.pull(config.init_from.adapter, config.init_from.revision)
        _log.info("starting from %s, round %d", artefact.origin, artefact.manifest.round)
        copy_artefact(artefact, folders.initial_adapter)
