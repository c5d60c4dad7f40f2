"""The federated loop: cohort, local training, aggregation, server step, commit."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pfm_llm.base.errors import TrainingError
from pfm_llm.base.files import remove_temporary
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes, log_to_trackers
from pfm_llm.base.progress import Progress
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.config.choices import ServerOptimizer
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.federation.aggregation_error import Factors, aggregation_error, factors_of
from pfm_llm.server.aggregation import RunningSum, SumPayload
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment, check_resumable
from pfm_llm.server.server import RoundSummary, Server

_log = logging.getLogger(__name__)

Validate = Callable[[], Mapping[str, Any]]
"""Evaluates the server's shared state on validation; returns figures for the log."""

OnCommit = Callable[[int], None]
"""Told of each round that has been committed."""


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs, wired by `experiment`.

    Attributes:
        config: The experiment.
        server: Holds the shared state.
        trainer: The clients' side.
        store: The clients' private folders.
        checkpoints: The commit point.
        environment: What a resumed run must match.
        metrics_log: A line per round.
        processes: Who shares the cohort.
    """

    config: ExperimentConfig
    server: Server
    trainer: LocalTrainer
    store: PrivateStore
    checkpoints: CheckpointStore
    environment: RunEnvironment
    metrics_log: MetricsLog
    processes: Processes


def run_rounds(
    federation: Federation,
    first_round: int,
    validate: Validate,
    on_commit: OnCommit = lambda _: None,
) -> None:
    """Run rounds ``first_round`` to the last one.

    Args:
        federation: The parts.
        first_round: 1, or the round after the commit point.
        validate: Called every ``evaluation.every`` rounds, on every process.
        on_commit: Called after every commit, on every process.

    Raises:
        TrainingError: A round in which no update was usable, or a step that was not finite. What
            was committed before stays.
    """
    config, server = federation.config, federation.server
    last_round, every = config.federation.num_rounds, config.evaluation.every
    progress = Progress(
        last_round,
        "federated rounds",
        federation.processes.is_main,
        unit="rounds",
        initial=first_round - 1,
    )
    with progress:
        for round_number in range(first_round, last_round + 1):
            started = time.perf_counter()
            cohort = server.select_cohort(round_number)
            total, error = train_cohort(federation, cohort)
            summary = server.aggregate(total)
            _require_usable(summary)
            record = _record(federation, summary, time.perf_counter() - started)
            if error is not None:
                record["aggregation_error"] = error
            if every and round_number % every == 0 and round_number < last_round:
                record["validation"] = validate()
            _report(federation, record, progress)
            if round_number % config.output.checkpoint_every == 0 or round_number == last_round:
                commit(federation, round_number)
                on_commit(round_number)


def train_cohort(federation: Federation, cohort: Sequence[str]) -> tuple[RunningSum, float | None]:
    """Train a cohort, each process its chunks, and sum the updates in the order of chunks.

    Args:
        federation: The parts.
        cohort: Client ids.

    Returns:
        The sum over the whole cohort, equal on every process; and, where models are averaged, by
        how much the mean of the LoRA factors misses the mean of their products.
    """
    server, trainer, processes = federation.server, federation.trainer, federation.processes
    pieces: list[tuple[int, tuple[SumPayload, list[tuple[float, Factors]]]]] = []
    averages = federation.config.federation.server.optimizer is not ServerOptimizer.FEDADAM
    with processes.together():
        for index, chunk in processes.share(trainer.chunks(cohort)):
            subtotal = RunningSum()
            own: list[tuple[float, Factors]] = []
            for update in trainer.train_chunk(chunk, server.shared):
                if server.receive(subtotal, update) and averages:
                    weight = server.weight_of(update)
                    own.append((weight, factors_of(server.shared.tensors, update.delta)))
            pieces.append((index, (subtotal.to_payload(), own)))
    total = RunningSum()
    clients: list[tuple[float, Factors]] = []
    for payload, own in processes.gather(pieces):
        total.merge(RunningSum.from_payload(payload))
        clients += own
    return total, aggregation_error(clients)


def commit(federation: Federation, round_number: int) -> None:
    """Make a round count: once this returns, a resumed run goes on after it.

    Raises:
        StorageError: It could not be written, on every process; the commit point is what it was.
    """
    with federation.processes.together():
        if federation.processes.is_main:
            federation.checkpoints.save(
                round_number, federation.server.state_tensors(), federation.environment
            )
            federation.store.prune(min(federation.checkpoints.rounds()))


def _require_usable(summary: RoundSummary) -> None:
    if summary.num_updates == 0:
        reason = summary.refusals[0] if summary.refusals else "the cohort sent nothing"
        raise TrainingError(
            f"round {summary.round_number}: none of {len(summary.refusals)} updates was usable "
            f"({reason}); lower the learning rates under federation.local and federation.server, "
            "then go on with --resume from the last commit"
        )


def _record(federation: Federation, summary: RoundSummary, seconds: float) -> dict[str, Any]:
    size = federation.server.table.num_bytes
    num_clients = summary.num_updates + len(summary.refusals)
    return {
        "round": summary.round_number,
        "loss": summary.loss,
        "num_clients": num_clients,
        "num_examples": summary.num_examples,
        "refused": len(summary.refusals),
        "seconds": seconds,
        "clients_per_second": num_clients / seconds,
        "bytes_up": size * num_clients,
        "bytes_down": size * num_clients,
        "lr_factor": summary.lr_factor,
        "aggregated_norm": summary.update_norm,
    }


def _report(federation: Federation, record: Mapping[str, Any], progress: Progress) -> None:
    figures = {"loss": record["loss"], "clients/s": record["clients_per_second"]}
    for mode, values in record.get("validation", {}).items():
        figures[f"{mode} ndcg@10"] = values["ndcg@10"]
    progress.update(1, **figures)
    with federation.processes.together():
        if federation.processes.is_main:
            federation.metrics_log.append(record)
            log_to_trackers(federation.processes, record, record["round"])


def resume_from(federation: Federation, from_round: int | None = None) -> int:
    """Go back to the commit point; whatever is newer never happened.

    Args:
        federation: The parts.
        from_round: An older round that is kept, to be made the commit point; None: the newest.

    Returns:
        The first round to run: 1 when nothing was committed.

    Raises:
        CheckpointError: The run was made under other settings, or in an environment that would
            not end with the same bits; or ``from_round`` is not kept.
        CorruptFileError: The checkpoint is damaged; the message names the round to go back to.
    """
    checkpoint = federation.checkpoints.load(from_round)
    committed = 0
    if checkpoint is not None:
        check_resumable(checkpoint.environment, federation.environment)
        federation.server.load_state_tensors(checkpoint.tensors, checkpoint.round_number)
        committed = checkpoint.round_number
    with federation.processes.together():
        if federation.processes.is_main:
            if from_round is not None:
                federation.checkpoints.rollback(from_round)
            discarded = federation.store.discard_newer(committed)
            federation.metrics_log.truncate_after(committed)
            remove_temporary(federation.metrics_log.path.parent)
            _log.info(
                "resuming after round %d (%d newer private states discarded)", committed, discarded
            )
    return committed + 1
