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
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known
from pfm_llm.federation.exchange import Exchange
from pfm_llm.federation.forecast import Forecast
from pfm_llm.federation.privacy import last_admitted, open_ledger
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment, check_resumable
from pfm_llm.server.privacy.mechanism import as_figures
from pfm_llm.server.round_summary import RoundSummary
from pfm_llm.server.server import Server

_log = logging.getLogger(__name__)

Validate = Callable[[], Mapping[str, Any]]
"""Evaluates the server's shared state on validation; returns figures for the log."""

_MAX_EMPTY_ROUNDS = 20
"""A run stops after so many rounds in a row without any usable update."""

OnCommit = Callable[[int], None]
"""Receives each round after its commit."""


@dataclass(frozen=True)
class Federation:
    """The objects of the federated loop; `experiment` connects them.

    Attributes:
        config: The experiment.
        server: Holds the shared state.
        exchange: Trains cohorts.
        checkpoints: The commit point.
        environment: The conditions that a resumed run must match.
        metrics_log: One line per round.
        processes: The processes that share the cohort.
    """

    config: ExperimentConfig
    server: Server
    exchange: Exchange
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
    """Run rounds ``first_round`` to the last one, or to the last one that the budget admits.

    Args:
        federation: The objects of the loop.
        first_round: 1, or the round after the commit point.
        validate: Called every ``evaluation.every`` rounds, on every process.
        on_commit: Called after every commit, on every process.

    Raises:
        TrainingError: In a round, a client gave neither an update nor a refusal, or the step was
            not finite; or no update was usable in many rounds in a row, or in most rounds of the
            run. The round does not count; all committed rounds stay.
        ConfigError: The budget of ``federation.privacy`` admits no round.
        CheckpointError: The ledger of privacy does not fit the commit point.
    """
    config, server = federation.config, federation.server
    last_round, every = _last_round(federation, first_round), known(config.evaluation.every)
    commit_every = known(config.output.checkpoint_every)
    progress = Progress(
        last_round,
        "federated rounds",
        federation.processes.is_main,
        unit="rounds",
        initial=first_round - 1,
    )
    num_clients, cohort_size = server.num_clients, known(config.federation.cohort_size)
    forecast = Forecast(first_round, last_round, num_clients, cohort_size)
    num_empty = 0
    with progress:
        for round_number in range(first_round, last_round + 1):
            started = time.perf_counter()
            cohort = server.select_cohort(round_number)
            updates = federation.exchange.train(cohort, server.broadcast)
            _check_complete(updates, cohort, round_number)
            num_empty = 0 if updates.tally.num_updates else num_empty + 1
            _check_usable(server, updates, num_empty, last_round)
            _charge(federation, round_number)
            summary = server.aggregate(updates)
            record = _record(federation, summary, time.perf_counter() - started)
            commits = round_number % commit_every == 0 or round_number == last_round
            if commits and server.privacy is not None:
                record["privacy"] = as_figures(server.privacy.spent())
            if every and round_number % every == 0 and round_number < last_round:
                record["validation"] = validate()
            left = forecast.add(record["seconds"], record.get("trunk_seconds", 0.0))
            _report(federation, record, progress, left)
            if commits:
                commit(federation, round_number)
                on_commit(round_number)


def commit(federation: Federation, round_number: int) -> None:
    """Commit a round: from then on, a resumed run continues after it.

    Raises:
        StorageError: The round could not be written. Every process raises this, and the commit
            point is unchanged.
    """
    with federation.processes.together():
        if federation.processes.is_main:
            federation.checkpoints.save(
                round_number, federation.server.state_tensors(), federation.environment
            )
            federation.exchange.prune(min(federation.checkpoints.rounds()))


def _last_round(federation: Federation, first_round: int) -> int:
    """The last round of the run; the ledger of privacy is open from here on."""
    server, planned = federation.server, known(federation.config.federation.num_rounds)
    open_ledger(server, federation.checkpoints, federation.processes)
    if server.privacy is None:
        return planned
    last_round = last_admitted(server.privacy, first_round)
    if last_round < planned:
        _log.warning(
            "the budget of federation.privacy ends this run after round %d of %d",
            *(last_round, planned),
        )
    return last_round


def _charge(federation: Federation, round_number: int) -> None:
    """Pay for a release before it is made."""
    if federation.server.privacy is not None:
        with federation.processes.together():
            federation.server.privacy.charge(round_number)


def _check_complete(updates: Aggregator, cohort: Sequence[str], round_number: int) -> None:
    """Raise `TrainingError` if a client gave neither an update nor a refusal."""
    tally = updates.tally
    silent = sorted(set(cohort).difference(tally.client_ids))
    if len(silent) > len(tally.refusals):
        raise TrainingError(
            f"round {round_number}: of {len(cohort)} clients {tally.num_updates} sent an update "
            f"and {len(tally.refusals)} were refused; the others did not answer "
            f"(clients without an update: {', '.join(map(repr, silent[:3]))}). The round does not "
            "count; continue from the last commit with --resume"
        )


def _check_usable(server: Server, updates: Aggregator, num_empty: int, last_round: int) -> None:
    """Raise `TrainingError` if training would go on, or end, with next to nothing to learn from.

    Args:
        server: Before its step of the round.
        updates: The updates of the round.
        num_empty: How many rounds in a row, up to this one, had no usable update.
        last_round: The last round of the run.
    """
    round_number = server.round_under_way
    without = round_number - server.num_steps - bool(updates.tally.num_updates)
    mostly = round_number == last_round and 2 * without > last_round
    if num_empty >= _MAX_EMPTY_ROUNDS or mostly:
        refusals = updates.tally.refusals
        example = f" ({refusals[0]})" if refusals else ""
        raise TrainingError(
            f"{without} of {round_number} rounds had no usable update{example}; if training "
            "diverged, lower the learning rates under federation.local and federation.server; "
            "then continue from the last commit with --resume"
        )


def _record(federation: Federation, summary: RoundSummary, seconds: float) -> dict[str, Any]:
    size = federation.server.table.num_bytes
    num_clients = summary.num_updates + len(summary.refusals)
    record = {
        "round": summary.round_number,
        "loss": summary.loss,
        "num_clients": num_clients,
        "num_examples": summary.num_examples,
        "refused": len(summary.refusals),
        "clipped": summary.num_clipped,
        "seconds": seconds,
        "clients_per_second": num_clients / seconds,
        "bytes_up": size * num_clients,
        "bytes_down": size * num_clients,
        "lr_factor": summary.lr_factor,
        "aggregated_norm": summary.update_norm,
        **federation.exchange.diagnostics,
    }
    by_name = {
        "refused_by_reason": summary.refused_by_reason,
        "update_norms": summary.norm_quantiles,
        "stages": summary.stages,
    }
    return record | {name: figures for name, figures in by_name.items() if figures}


def _report(
    federation: Federation, record: Mapping[str, Any], progress: Progress, seconds_left: float
) -> None:
    figures = {"clients/s": record["clients_per_second"]}
    if record["loss"] is not None:  # of a round without any usable update
        figures = {"loss": record["loss"], **figures}
    for mode, values in record.get("validation", {}).items():
        figures |= {f"{mode} {k}": v for k, v in values.items() if k.startswith("ndcg")}
    progress.update(1, seconds_left=seconds_left, **figures)
    with federation.processes.together():
        if federation.processes.is_main:
            federation.metrics_log.append(record)
            log_to_trackers(federation.processes, record, record["round"])


def resume_from(federation: Federation, from_round: int | None = None) -> int:
    """Go back to the commit point and discard everything that is newer.

    Args:
        federation: The objects of the loop.
        from_round: An older kept round, which becomes the commit point; None: the newest round.

    Returns:
        The first round to run; 1 if no round was committed.

    Raises:
        CheckpointError: The run has other settings, its environment would lead to other bits, or
            ``from_round`` is not kept.
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
            if checkpoint is not None:
                # Also without --from-round: a kill right after the last commit leaves old rounds.
                federation.checkpoints.rollback(committed)
                federation.exchange.prune(min(federation.checkpoints.rounds()))
            discarded = federation.exchange.discard_newer(committed)
            federation.metrics_log.truncate_after(committed)
            remove_temporary(federation.metrics_log.path.parent)
            _log.info(
                "resuming after round %d (%d newer private states discarded)", committed, discarded
            )
    return committed + 1
