"""Local training of the clients in the many-clients pass."""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from pfm_llm.client.histories import BatchSource, ClientHistories, LocalWork, most_windows
from pfm_llm.client.local_steps import StackedOptimizer
from pfm_llm.client.private_steps import PrivateSteps
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.choices import Schedule
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known
from pfm_llm.data.history import History
from pfm_llm.model.batches import collate, stacked_tensors
from pfm_llm.model.cohort import CohortModel, Parts
from pfm_llm.model.private.part import PrivatePart
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.stages import Stages
from pfm_llm.protocol.transport import as_sent
from pfm_llm.protocol.types import PRIVATE_PREFIX, ClientUpdate, PrivateState, SharedState, Tensors

_log = logging.getLogger(__name__)


def plan_chunks(
    client_ids: Iterable[str], num_tokens: Callable[[str], int], tokens_per_chunk: int
) -> list[tuple[str, ...]]:
    """Group clients into chunks for the many-clients pass; their order does not matter.

    Clients of similar size share a chunk, which keeps the padding small.

    Args:
        client_ids: The clients to group.
        num_tokens: Padded tokens of one client.
        tokens_per_chunk: Bound per chunk; a single client may exceed it.
    """
    ordered = sorted(client_ids, key=lambda client_id: (num_tokens(client_id), client_id))
    chunks: list[list[str]] = []
    room = 0
    for client_id in ordered:
        size = num_tokens(client_id)
        if not chunks or size > room:
            chunks.append([])
            room = tokens_per_chunk
        chunks[-1].append(client_id)
        room -= size
    return [tuple(chunk) for chunk in chunks]


class StepLosses(Protocol):
    """The losses of some clients at the steps of a round."""

    def __call__(self, step: int, stacked: Tensors, parts: Parts) -> list[torch.Tensor]:
        """The loss of each client at a step, from the stacked tensors [C, ...]."""
        ...


class StepTrainer(ABC):
    """Trains chunks of clients by gradient steps. It makes updates, and stores private states.

    A subclass knows what the clients learn from.

    Args:
        config: The experiment.
        private: The private part.
        store: The store of private states; nothing else receives them.
        contract: The tensors that an update may hold.
        device: The device that computes.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        private: PrivatePart,
        store: PrivateStore,
        contract: UpdateContract,
        device: torch.device,
    ) -> None:
        self._config = config
        self._store = store
        self._contract = contract
        self._private = private
        self._device = device
        self._local = config.federation.local
        self._most_windows = most_windows(config.data.users_per_client)

    @abstractmethod
    def _num_examples(self, client_id: str) -> int:
        """How many examples a client learns from in a round."""

    @abstractmethod
    def _num_tokens(self, client_id: str, limit: int) -> int:
        """Padded tokens of a client in a step that reads at most ``limit`` windows."""

    @abstractmethod
    def _step_losses(self, chunk: Sequence[str], work: LocalWork, round_number: int) -> StepLosses:
        """The losses of some clients, each with an example, at the steps of a round."""

    @functools.cached_property
    def _stages(self) -> Stages:
        """The stages of updates; who trains for one user alone sends none."""
        federation = self._config.federation
        stages = [stage.choice for stage in federation.stages]
        return Stages(stages, self._config.seed, known(federation.cohort_size))

    def chunks(self, cohort: Sequence[str]) -> list[tuple[str, ...]]:
        """The chunks of a cohort; equal on every process."""
        limit = self.round_work().windows_per_step
        size = functools.partial(self._num_tokens, limit=limit)
        return plan_chunks(cohort, size, self._config.runtime.tokens_per_chunk)

    def train_chunk(self, chunk: Sequence[str], shared: SharedState) -> list[ClientUpdate]:
        """Train some clients for one round, and store their new private states."""
        round_number = shared.round_number + 1
        work = self.round_work()
        trains_private = any(moves for _, moves in work.plan())
        private = self._load_private(chunk, round_number - 1) if trains_private else {}
        received = self._stack_shared(shared, len(chunk))
        new, losses = self._train(chunk, {**received, **private}, work, round_number)
        sent = self._contract.tensors
        if private:
            self._save_private(chunk, new, round_number)
        counts = [self._num_examples(client_id) for client_id in chunk]
        return [
            self._contract.build(
                client_id=client_id,
                round_number=round_number,
                num_examples=counts[c],
                loss=losses[c],
                delta=as_sent(
                    self._stages.on_client(
                        {name: (new[name][c] - received[name][c]).cpu() for name in sent},
                        client_id,
                        round_number,
                    ),
                    sent,
                ),
            )
            for c, client_id in enumerate(chunk)
        ]

    def round_work(self) -> LocalWork:
        """The steps of a client in a round."""
        local = self._local
        after = local.schedule is Schedule.PRIVATE_AFTER
        private_in_round = self._private.takes_steps and not after
        return LocalWork(
            shared_steps=local.shared_local_steps,
            private_steps=local.private_local_steps if private_in_round else 0,
            schedule=local.schedule,
            purpose="round",
            windows_per_step=local.windows_per_step or self._most_windows,
        )

    def personalise(self, chunk: Sequence[str], shared: SharedState) -> dict[str, torch.Tensor]:
        """Fit private parts that take steps to a shared state, on training examples only.

        They start from each client's newest private state up to the round of ``shared``. Clients
        without examples keep their state.

        Returns:
            Stacked private tensors [C, ...]; none for a part that takes no steps. The store is not
            changed.
        """
        if not self._private.takes_steps:
            return {}
        private = self._load_private(chunk, shared.round_number)
        able = [c for c, client_id in enumerate(chunk) if self._num_examples(client_id)]
        steps = self._local.personalise_steps
        if not steps or not able:
            return private
        work = LocalWork(
            shared_steps=0,
            private_steps=steps,
            schedule=Schedule.ALTERNATE,
            purpose="personalise",
            windows_per_step=self._local.personalise_windows or self._most_windows,
        )
        fitted = {name: value[able] for name, value in private.items()}
        stacked = {**self._stack_shared(shared, len(able)), **fitted}
        new, _ = self._train([chunk[c] for c in able], stacked, work, shared.round_number)
        # A client whose new values are not finite keeps its old state.
        good = torch.stack([new[name].flatten(1).isfinite().all(1) for name in private]).all(0)
        rows = torch.tensor(able, device=good.device)[good]
        return {n: value.index_copy(0, rows, new[n][good]) for n, value in private.items()}

    def personalise_steps(self, chunk: Sequence[str]) -> int:
        """The most private gradient steps of `personalise`, over all clients of the chunk."""
        able = sum(bool(self._num_examples(client_id)) for client_id in chunk)
        if self._private.takes_steps:
            return self._local.personalise_steps * able
        return 2 * self._config.adapters.private.steps * able  # before and after the guard

    def _train(
        self,
        chunk: Sequence[str],
        stacked: dict[str, torch.Tensor],
        work: LocalWork,
        round_number: int,
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        """Take the planned steps; the new tensors, and the losses of the first shared step."""
        local, clip = self._local, self._local.max_grad_norm
        shared_optimizer = StackedOptimizer(local.shared_optimizer, local.shared_lr, clip)
        private_optimizer = StackedOptimizer(local.private_optimizer, local.private_lr, clip)
        private_names = [name for name in stacked if name.startswith(PRIVATE_PREFIX)]
        # Training uses the full private adapter; `adapters.private.weight` applies to serving only.
        private_on = self._config.adapters.private.enabled
        parts = Parts(shared_lora=True, private_weight=1.0 if private_on else 0.0)
        first_losses: list[float] | None = None
        losses_at = self._step_losses(chunk, work, round_number)
        for step, (moves_shared, moves_private) in enumerate(work.plan()):
            shared = _leaves(stacked, self._contract.tensors) if moves_shared else {}
            private = _leaves(stacked, private_names) if moves_private else {}
            current = {**stacked, **shared, **private}
            losses = losses_at(step, current, parts)
            if moves_shared and first_losses is None:
                first_losses = [float(loss.detach()) for loss in losses]
            gradients = torch.autograd.grad(
                torch.stack(losses).sum(),
                [*shared.values(), *private.values()],
                allow_unused=True,
                materialize_grads=True,
            )
            stacked |= shared_optimizer.step(shared, gradients[: len(shared)])
            stacked |= private_optimizer.step(private, gradients[len(shared) :])
        new = {name: value.detach() for name, value in stacked.items()}
        return new, first_losses or [math.nan] * len(chunk)

    def _stack_shared(self, shared: SharedState, num_clients: int) -> dict[str, torch.Tensor]:
        return stacked_tensors(shared.tensors, num_clients, self._device)

    def _load_private(self, chunk: Sequence[str], at_most: int) -> dict[str, torch.Tensor]:
        states = []
        for client_id in chunk:
            state = self._store.load(client_id, at_most=at_most)
            states.append(state.tensors if state else self._private.initial(client_id))
        return self._stack_private(states)

    def _stack_private(self, states: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        device = self._device
        return {name: torch.stack([s[name] for s in states]).to(device) for name in states[0]}

    def _save_private(self, chunk: Sequence[str], new: Tensors, round_number: int) -> None:
        names = [name for name in new if name.startswith(PRIVATE_PREFIX)]
        for c, client_id in enumerate(chunk):
            tensors = {name: new[name][c].cpu() for name in names}
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                _log.warning("client %s: private step was not finite, kept the old one", client_id)
                continue
            self._store.save(PrivateState(client_id, round_number, tensors))


class LocalTrainer(StepTrainer):
    """Trains clients on the windows of their histories.

    Args:
        config: The experiment.
        model: The many-clients model.
        histories: The clients' data.
        store: The store of private states; nothing else receives them.
        contract: The tensors that an update may hold.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: CohortModel,
        histories: ClientHistories,
        store: PrivateStore,
        contract: UpdateContract,
    ) -> None:
        super().__init__(config, model.objective.private, store, contract, model.item_texts.device)
        self._model = model
        self._histories = histories
        self._steps = PrivateSteps(config, model, histories)

    def personalise(self, chunk: Sequence[str], shared: SharedState) -> dict[str, torch.Tensor]:
        """See `StepTrainer.personalise`; a part that takes no steps is fitted by `fit`."""
        if not self._private.takes_steps:
            return self.fit(chunk, shared, [None] * len(chunk))
        return super().personalise(chunk, shared)

    def fit(
        self, chunk: Sequence[str], shared: SharedState, shown: Sequence[History | None]
    ) -> dict[str, torch.Tensor]:
        """Private tensors for a shared state and the history of each client.

        Args:
            chunk: Client ids.
            shared: The shared state.
            shown: Per client its training history and the interactions after it; None: the
                training history.

        Returns:
            Stacked private tensors [C, ...]; the initial ones for clients without a history.

        Raises:
            DataError: A history does not begin with the training history.
        """
        found = self._read(chunk, shared, shown)
        if self._config.adapters.private.steps:
            found = self._steps(chunk, self._whole(chunk, shown), shared, found)
        return found

    def _read(
        self, chunk: Sequence[str], shared: SharedState, shown: Sequence[History | None]
    ) -> dict[str, torch.Tensor]:
        """`fit` before any step."""
        histories = self._histories
        if not self._private.reads_text:
            stacked = self._stack_shared(shared, len(chunk))
            return self._model.fit_without_text(self._whole(chunk, shown), stacked)
        private = self._stack_private([self._private.initial(client_id) for client_id in chunk])
        later = [
            () if given is None else histories.later_windows(client_id, given)
            for client_id, given in zip(chunk, shown, strict=True)
        ]
        windows = [[*histories.windows(c), *new] for c, new in zip(chunk, later, strict=True)]
        able = [c for c, own in enumerate(windows) if own]
        if not able:
            return private
        states = [histories.trunk_states(chunk[c], later[c]) for c in able]
        batch = collate([windows[c] for c in able], states)
        fitted = self._model.fit(batch, self._stack_shared(shared, len(able)))
        rows = torch.tensor(able, device=self._device)
        return {name: value.index_copy(0, rows, fitted[name]) for name, value in private.items()}

    def _whole(self, chunk: Sequence[str], shown: Sequence[History | None]) -> list[History]:
        pairs = zip(chunk, shown, strict=True)
        return [self._histories.history(client_id, given) for client_id, given in pairs]

    def personalise_tokens(self, client_id: str) -> int:
        """Padded tokens of one client in one step of `personalise`."""
        steps = self._config.adapters.private.steps
        if not (self._private.takes_steps or self._private.reads_text or steps):
            return 0
        limit = None if steps else self._local.personalise_windows
        limit = limit or self._most_windows
        return self._histories.num_tokens(client_id, limit)

    def _num_examples(self, client_id: str) -> int:
        return sum(window.num_targets for window in self._histories.windows(client_id))

    def _num_tokens(self, client_id: str, limit: int) -> int:
        return self._histories.num_tokens(client_id, limit)

    def _step_losses(self, chunk: Sequence[str], work: LocalWork, round_number: int) -> StepLosses:
        batches = BatchSource(self._config, self._histories, chunk, work, round_number)

        def losses(step: int, stacked: Tensors, parts: Parts) -> list[torch.Tensor]:
            return self._model.losses(batches.batch(step), stacked, parts, batches.dropout(step))

        return losses


def _leaves(stacked: Tensors, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some tensors as leaves, of which gradients are taken."""
    return {name: stacked[name].detach().requires_grad_() for name in names}
