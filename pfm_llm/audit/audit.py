"""An audit: every mode of protection, every surface, every attack."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.audit import adapter
from pfm_llm.audit.attacks import Suspects
from pfm_llm.audit.figures import UPDATE, AuditRow, Findings, adapter_row, place_of
from pfm_llm.audit.modes import AuditMode, Protection, check_auditable, config_of
from pfm_llm.audit.view import watch_round
from pfm_llm.base.errors import ConfigError
from pfm_llm.base.processes import Processes, start_processes
from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.stages import FEWEST_MASKED
from pfm_llm.protocol.stages import Stages
from pfm_llm.protocol.transport import broadcast
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.publish.artefact import Artefact
from pfm_llm.runs.environment import environment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.opening import run_in_work
from pfm_llm.runs.run import Corpus, Run, assemble, load_corpus, settled

_GROUPS = (
    (AuditMode.CLEAR, AuditMode.CLIP, AuditMode.MASKS),
    (AuditMode.NOISE, AuditMode.ALL),
)
"""Modes whose shared tensors are the same: with noise there is no ``head.item_met``."""
_TRAINED = (AuditMode.CLEAR, AuditMode.CLIP, AuditMode.NOISE)
"""Modes of which an adapter is trained. Masks do not change what is learned from a sum."""
_FEWEST_USERS = 2 * FEWEST_MASKED
_FEWEST_SUMS, _CLIENTS_SEEN = 8, 256


@dataclass(frozen=True)
class Plan:
    """The size of an audit.

    Attributes:
        users: How many users are attacked; all, if there are fewer.
        cohorts: Clients in a sum; sizes of more than half of the users are left out.
        passes: Mean participations of a user in the training of an adapter; 0: none is trained.
        protection: The strength of clip and noise.
    """

    users: int = 128
    cohorts: tuple[int, ...] = (8, 64)
    passes: float = 2.5
    protection: Protection = field(default_factory=Protection)


@dataclass(frozen=True)
class _Subject:
    """What is audited.

    Attributes:
        config: The experiment, settled.
        data: Its data.
        processes: The one process.
        folder: For whatever an audit trains; it is deleted at the end.
        shared: The state at which updates are made; None: that of the adapter that the audit
            trains in the clear, or the initial one.
        artefact: The adapter that the experiment started from.
    """

    config: ExperimentConfig
    data: Corpus
    processes: Processes
    folder: Path
    shared: SharedState | None = None
    artefact: Artefact | None = None


@dataclass
class _Audit:
    subject: _Subject
    plan: Plan
    rows: list[AuditRow] = field(default_factory=list)
    shared: SharedState | None = None

    def run_group(self, modes: Sequence[AuditMode]) -> Run:
        """Audit modes with the same shared tensors."""
        subject, first = self.subject, self._config(modes[0])
        folders = RunFolders.of(subject.folder / modes[0].value)
        run = assemble(first, subject.data, folders, subject.processes, subject.artefact)
        if self.plan.passes:
            self._audit_adapters(run, [mode for mode in modes if mode in _TRAINED])
        given = self.shared or subject.shared or run.model.shared
        kept = SharedState({n: given.tensors[n] for n in run.model.table}, given.round_number)
        shared = broadcast(kept, run.model.contract.tensors)
        clients = _sample(run, self.plan.users)
        updates = {u.client_id: u for u in adapter.updates_of(run, clients, shared, "updates")}
        for mode in modes:
            own = self._protected(run, mode)
            stages = [stage.choice for stage in own.config.federation.stages]
            applied = Stages(stages, own.config.seed, len(updates))
            updates = {c: _staged(one, applied) for c, one in updates.items()}
            self._audit_rounds(own, mode, shared, updates)
        return run

    def _config(self, mode: AuditMode) -> ExperimentConfig:
        return config_of(self.subject.config, mode, self.plan.protection)

    def _protected(self, run: Run, mode: AuditMode) -> Run:
        """The run whose clients and server protect updates in another way."""
        return adapter.with_trainer(run, self._config(mode))

    def _audit_adapters(self, run: Run, modes: Sequence[AuditMode]) -> None:
        inside, outside = adapter.halves(run)
        count = self.plan.users
        asked, members = [*inside[:count], *outside[:count]], min(count, len(inside))
        for mode in modes:
            trained = adapter.train_on(self._protected(run, mode), inside, self.plan.passes)
            if mode is AuditMode.CLEAR and self.subject.shared is None:
                self.shared = trained
            scores = adapter.marks(run, asked, trained, f"users of the adapter, {mode}")
            self.rows.append(adapter_row(mode, scores, members))

    def _audit_rounds(
        self,
        run: Run,
        mode: AuditMode,
        shared: SharedState,
        updates: Mapping[str, ClientUpdate],
    ) -> None:
        suspects = Suspects(updates)
        histories = {c: frozenset(run.clients.histories.history(c).items.tolist()) for c in updates}
        texts = run.model.model.item_texts.cpu()
        usual = round(np.mean([one.num_examples for one in updates.values()]))

        def new(surface: str) -> Findings:
            return Findings(mode, surface, histories, texts, usual)

        messages = new(UPDATE)
        sizes = [n for n in self.plan.cohorts if FEWEST_MASKED <= n <= len(updates) // 2]
        for size in sizes:
            summed, released = new(f"sum_{size}"), new(f"released_{size}")
            cohorts = list(_cohorts(tuple(updates), size, run.config.seed))
            with Progress(len(cohorts), f"{mode}: sums of {size}", unit="rounds") as progress:
                for cohort in cohorts:
                    seen = watch_round(run, shared, {c: updates[c] for c in cohort})
                    summed.add(seen.summed, suspects)
                    if mode.is_noisy:
                        released.add(seen.released, suspects)
                    # Masks are new in each round; an update in the clear is the same one again.
                    for message in seen.messages if mode.is_masked or size == sizes[0] else ():
                        messages.add(message, suspects)
                    progress.update()
            self.rows += summed.rows() + (released.rows() if mode.is_noisy else [])
        self.rows += messages.rows()


def audit_config(config: ExperimentConfig, plan: Plan) -> dict[str, Any]:
    """Audit an experiment that was not run.

    Args:
        config: The experiment.
        plan: The size of the audit.

    Returns:
        See `audit_run`.

    Raises:
        PfmError: The experiment cannot be assembled or trained.
    """
    check_auditable(config)
    processes = start_processes(config.runtime.threads)
    data = load_corpus(config)
    with tempfile.TemporaryDirectory(prefix="pfm-audit-") as folder:
        return _audited(_Subject(settled(config, data), data, processes, Path(folder)), plan)


def audit_run(folder: Path, plan: Plan) -> dict[str, Any]:
    """Audit a run: its users' updates at its last commit, and an adapter of half of its users.

    The run is not changed. Private parts that take steps begin anew.

    Args:
        folder: The run's folder.
        plan: The size of the audit.

    Returns:
        ``rows`` (see `AuditRow`), the plan, the settings and the environment; no row names a user.

    Raises:
        ConfigError: There is no such run, or it cannot be audited.
        CheckpointError: It has no commit, or its data have changed.
        BusyError: Another process trains or measures it.
    """
    with run_in_work(folder) as (run, trained), tempfile.TemporaryDirectory() as scratch:
        check_auditable(run.config)
        given = (trained.shared, run.artefact)
        return _audited(_Subject(run.config, run.data, run.processes, Path(scratch), *given), plan)


def _audited(subject: _Subject, plan: Plan) -> dict[str, Any]:
    if subject.processes.count > 1:
        raise ConfigError("an audit runs in one process; start `pfm audit` without a launcher")
    found = _Audit(subject, plan)
    for modes in _GROUPS:
        run = found.run_group(modes)
    rows = sorted(found.rows, key=place_of)
    if not rows:
        raise ConfigError(f"an audit needs {_FEWEST_USERS} users at least; give more data")
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "plan": dataclasses.asdict(plan),
        "config": subject.config.model_dump(mode="json"),
        "environment": environment(
            seed=subject.config.seed,
            dtype=str(run.model.backbone.dtype).removeprefix("torch."),
            threads=subject.processes.threads,
            num_processes=1,
            device=subject.processes.device.type,
        ),
    }


def _sample(run: Run, count: int) -> tuple[str, ...]:
    clients = run.clients.histories.trainable
    order = numpy_generator(run.config.seed, "audit/users").permutation(len(clients))
    return tuple(sorted(clients[place] for place in order[:count]))


def _cohorts(clients: Sequence[str], size: int, seed: int) -> Iterator[list[str]]:
    """Cohorts of a size; nobody is in one twice before everybody was, but for a remainder."""
    count, made = max(_FEWEST_SUMS, _CLIENTS_SEEN // size), 0
    generator = numpy_generator(seed, f"audit/cohorts/{size}")
    while made < count:
        order = generator.permutation(len(clients))
        for start in range(0, len(order) - size + 1, size):
            if made < count:
                yield [clients[place] for place in order[start : start + size]]
                made += 1


def _staged(update: ClientUpdate, stages: Stages) -> ClientUpdate:
    delta = stages.on_client(update.delta, update.client_id, update.round_number)
    return dataclasses.replace(update, delta=delta)
