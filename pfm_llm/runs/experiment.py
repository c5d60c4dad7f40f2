"""A whole run: config -> objects -> rounds -> evaluation -> report. The only place that wires."""

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.errors import CheckpointError, HubError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes, start_processes
from pfm_llm.config.choices import Aggregation, ServerOptimizer
from pfm_llm.config.schema import ExperimentConfig, dump_config, load_config, training_hash
from pfm_llm.evaluation import ranking
from pfm_llm.evaluation.baselines import parse_names
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.federation.rounds import Federation, resume_from, run_rounds
from pfm_llm.protocol.types import Mode, SharedState
from pfm_llm.publish import hub
from pfm_llm.publish.export import export_shared_adapter
from pfm_llm.publish.publishing import PublishRequest, publish
from pfm_llm.publish.versions import copy_artefact
from pfm_llm.runs.environment import environment
from pfm_llm.runs.folders import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RunFolders
from pfm_llm.runs.private_weight import with_chosen_weight
from pfm_llm.runs.publication import request_of
from pfm_llm.runs.report import evaluate_and_report, exported_model, measure, validation_task
from pfm_llm.runs.run import Assembly, assemble, load_corpus, settled
from pfm_llm.server.checkpoint import Checkpoint, CheckpointStore, RunEnvironment
from pfm_llm.server.server import Server

_log = logging.getLogger(__name__)
SERVER_FOLDER = "server"


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
        corpus = load_corpus(config)
        if processes.is_main:
            _log.info("data: %s\n%s", corpus.report.describe(), corpus.split.describe())
        config = settled(config, corpus)
        if resume:
            folders.check_settings(config)
        else:
            _write_settings(config, folders, processes)
            _fetch_initial_adapter(config, folders, processes)
        assembly = assemble(config, corpus, folders, processes)
        federation = make_federation(assembly, folders, processes)
        federation.server.select_cohort(1)
        parse_names(config.evaluation.baselines)
        _write_environment(assembly, folders, processes)
    first_round = resume_from(federation, from_round) if resume else 1
    processes.accelerator.init_trackers(folders.public.name)
    validate = functools.partial(_validate, federation, assembly, processes)
    on_commit = functools.partial(_push_when_due, federation, assembly, folders)
    started = time.perf_counter()
    run_rounds(federation, first_round, validate, on_commit)
    seconds = time.perf_counter() - started
    if first_round > 1:
        _log.info("resumed at round %d: training time below is of this part alone", first_round)
    shared = federation.server.shared
    assembly = with_chosen_weight(assembly, processes, folders.public, shared)
    evaluate_and_report(assembly, folders, processes, shared, seconds)
    _push(assembly, folders, processes)
    processes.accelerator.end_training()
    return folders.public


def evaluate_run(run: Path, against: Sequence[Path] = ()) -> Path:
    """Evaluate a finished or interrupted run anew from its last commit, and rewrite its report.

    Args:
        run: The run's folder.
        against: Result files of trained baselines, to be compared with user by user.

    Returns:
        The run's folder.

    Raises:
        CheckpointError: Nothing was ever committed.
        DataError: A file of ``against`` is of other data, or says nothing of single users.
    """
    opened = open_run(run)
    evaluate_and_report(
        opened.assembly,
        RunFolders.of(run),
        opened.processes,
        opened.shared,
        None,
        against,
    )
    return run


@dataclass(frozen=True)
class OpenedRun:
    """A run that was trained, wired again.

    Attributes:
        assembly: Its objects.
        processes: Who works on it.
        shared: The shared state of its last commit.
    """

    assembly: Assembly
    processes: Processes
    shared: SharedState


def open_run(run: Path) -> OpenedRun:
    """Wire a finished or interrupted run again, at its last commit.

    Raises:
        CheckpointError: Nothing was ever committed.
    """
    config = load_config(run / CONFIG_FILE)
    processes = start_processes(config.runtime.threads)
    folders = RunFolders.of(run)
    corpus = load_corpus(config)
    assembly = assemble(settled(config, corpus), corpus, folders, processes)
    shared = load_shared(assembly, folders)
    assembly = with_chosen_weight(assembly, processes, folders.public, shared)
    return OpenedRun(assembly, processes, shared)


def make_federation(assembly: Assembly, folders: RunFolders, processes: Processes) -> Federation:
    """The parts of the federated loop for an assembled experiment."""
    config = assembly.config
    environment = RunEnvironment.here(
        config_hash=training_hash(config),
        contract_hash=assembly.parts.contract.hash(),
        data_hash=assembly.corpus.interactions.content_hash(),
        num_processes=processes.count,
        tokens_per_chunk=config.runtime.tokens_per_chunk,
        device=processes.device,
    )
    server, settings = _new_server(assembly), config.federation.server
    averages = settings.optimizer is not ServerOptimizer.FEDADAM
    measure_error = averages and settings.aggregator is Aggregation.MEAN
    return Federation(
        config=config,
        server=server,
        exchange=LocalExchange(server, assembly.trainer, assembly.store, processes, measure_error),
        checkpoints=CheckpointStore(folders.public / SERVER_FOLDER),
        environment=environment,
        metrics_log=MetricsLog(folders.public / METRICS_FILE),
        processes=processes,
    )


def _new_server(assembly: Assembly) -> Server:
    """The server before round 1."""
    return Server(
        assembly.parts.table,
        assembly.parts.contract,
        assembly.histories.trainable,
        assembly.config.federation,
        assembly.config.seed,
        assembly.parts.shared,
    )


def load_shared(assembly: Assembly, folders: RunFolders) -> SharedState:
    """The shared state of a run's last commit.

    Raises:
        CheckpointError: Nothing was ever committed.
    """
    checkpoint = CheckpointStore(folders.public / SERVER_FOLDER).load()
    if checkpoint is None:
        raise CheckpointError(
            f"{folders.public} has no committed round; run `pfm train --resume` first"
        )
    return shared_state(assembly, checkpoint)


def shared_state(assembly: Assembly, checkpoint: Checkpoint) -> SharedState:
    """The shared state that a commit of the experiment holds."""
    server = _new_server(assembly)
    server.load_state_tensors(checkpoint.tensors, checkpoint.round_number)
    return server.shared


def _validate(
    federation: Federation, assembly: Assembly, processes: Processes
) -> Mapping[str, Any]:
    modes = [Mode.SHARED_ONLY]
    if assembly.config.adapters.private.enabled:
        modes.append(Mode.SHARED_PRIVATE)
    task = validation_task(assembly, federation.server.shared, modes)
    found = measure(assembly, processes, task)
    return {mode.value: ranking.headline(found.ranks[mode]) for mode in modes}


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
        named = config.model_copy(update={"name": folders.public.name})
        files.write_text(folders.public / CONFIG_FILE, dump_config(named))
        files.make_private_dir(folders.private)
    processes.wait()


def _write_environment(assembly: Assembly, folders: RunFolders, processes: Processes) -> None:
    if not processes.is_main:
        return
    here = environment(
        seed=assembly.config.seed,
        dtype=str(assembly.parts.backbone.dtype).removeprefix("torch."),
        threads=processes.threads,
        num_processes=processes.count,
        device=processes.device.type,
    )
    data = asdict(assembly.corpus.report)
    del data["examples"]  # rows of somebody's data; the run folder may be shown to anybody
    here |= {"data": data, "split": assembly.corpus.split.describe()}
    here["num_clients"] = len(assembly.histories.trainable)
    files.write_json(folders.public / ENVIRONMENT_FILE, here)
    _log.info("%d threads x %d processes, %s", processes.threads, processes.count, here["dtype"])


def _fetch_initial_adapter(
    config: ExperimentConfig, folders: RunFolders, processes: Processes
) -> None:
    """Copy the adapter to start from into the run, which then needs neither Hub nor folder."""
    if config.init_from is None:
        return
    with processes.together():
        if not processes.is_main:
            return
        artefact = hub.pull(config.init_from.adapter, config.init_from.revision)
        _log.info("starting from %s, round %d", artefact.origin, artefact.manifest.round)
        copy_artefact(artefact, folders.initial_adapter)


def _push_when_due(
    federation: Federation, assembly: Assembly, folders: RunFolders, round_number: int
) -> None:
    """Publish a committed round; a Hub that fails costs the push, not the run."""
    wanted = assembly.config.push_to_hub
    is_last = round_number == assembly.config.federation.num_rounds
    if wanted is None or not wanted.every or round_number % wanted.every or is_last:
        return
    with federation.processes.together():
        if not federation.processes.is_main:
            return
        exported = folders.private / "pushed"
        export_shared_adapter(exported_model(assembly), exported, federation.server.shared)
        try:
            published = publish(_request(assembly, folders, exported))
            _log.info("round %d is at %s", round_number, published.pushed.url)
        except HubError as error:
            _log.warning("round %d was not pushed, training goes on: %s", round_number, error)
        finally:
            shutil.rmtree(exported, ignore_errors=True)


def _push(assembly: Assembly, folders: RunFolders, processes: Processes) -> None:
    """Publish the finished run.

    Raises:
        HubError: It could not be pushed; the message says how to push it later.
    """
    wanted = assembly.config.push_to_hub
    if wanted is None:
        return
    with processes.together():
        if not processes.is_main:
            return
        try:
            published = publish(_request(assembly, folders, tag=wanted.tag))
        except HubError as error:
            raise HubError(
                f"{error}\nThe run is complete; push it later with `pfm push "
                f"--run {folders.public} --repo {wanted.repo}`"
            ) from error
        _log.info("the shared adapter is at %s", published.pushed.url)


def _request(
    assembly: Assembly, folders: RunFolders, exported: Path | None = None, tag: str | None = None
) -> PublishRequest:
    wanted = assembly.config.push_to_hub
    assert wanted is not None
    return request_of(folders.public, wanted.repo, exported, private=wanted.private, tag=tag)
