"""The clients' side: histories, private states, and local training in the many-clients pass."""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pfm_llm import seeding
from pfm_llm.cohort_model import ChunkBatch, CohortModel, Dropout, Parts, collate
from pfm_llm.config import ExperimentConfig, Schedule
from pfm_llm.contract import UpdateContract
from pfm_llm.data.partition import Client
from pfm_llm.data.splits import TrainData
from pfm_llm.encoding import HistoryEncoder, Window
from pfm_llm.local_steps import StackedOptimizer
from pfm_llm.private_store import PrivateStore
from pfm_llm.trunk_cache import TrunkCache
from pfm_llm.types import PRIVATE_PREFIX, ClientUpdate, PrivateState, SharedState, Tensors

_log = logging.getLogger(__name__)

InitialPrivate = Callable[[str], dict[str, torch.Tensor]]


class ClientHistories:
    """What the simulated clients hold: training windows and their trunk states.

    Args:
        clients: The federation's clients.
        train: Training interactions; nothing held out can be reached from here.
        encoder: Renders and tokenises.
        cache: Trunk states.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        train: TrainData,
        encoder: HistoryEncoder,
        cache: TrunkCache,
    ) -> None:
        self.clients: Mapping[str, Client] = {client.client_id: client for client in clients}
        self._client_of = {user: client.client_id for client in clients for user in client.users}
        self._train = train
        self._encoder = encoder
        self._cache = cache
        self._windows: dict[str, tuple[Window, ...]] = {}

    @property
    def trainable(self) -> tuple[str, ...]:
        """Ids of the clients that have something to learn from: at least one transition."""
        offsets = self._train.interactions.offsets
        return tuple(
            client_id
            for client_id, client in self.clients.items()
            if any(offsets[user + 1] - offsets[user] >= 2 for user in client.users)
        )

    def client_of(self, user: int) -> str:
        """The client that holds a user's data."""
        return self._client_of[user]

    def windows(self, client_id: str) -> tuple[Window, ...]:
        """A client's training windows, by user, oldest first."""
        if client_id not in self._windows:
            interactions = self._train.interactions
            found: list[Window] = []
            for user in self.clients[client_id].users:
                found += self._encoder.training_windows(
                    interactions.history(user), interactions.ratings_of(user)
                )
            self._windows[client_id] = tuple(found)
        return self._windows[client_id]

    def trunk_states(self, client_id: str) -> list[torch.Tensor]:
        """Trunk states [T, d] of each of a client's training windows."""
        return self._cache.states(self.windows(client_id), client_id)

    def num_tokens(self, client_id: str, limit: int | None = None) -> int:
        """Padded size of a client's (at most ``limit``) windows: number times longest."""
        windows = self.windows(client_id)
        rows = len(windows) if limit is None else min(limit, len(windows))
        return rows * max((len(window.tokens) for window in windows), default=0)


def plan_chunks(
    client_ids: Iterable[str], num_tokens: Callable[[str], int], tokens_per_chunk: int
) -> list[tuple[str, ...]]:
    """Group clients for the many-clients pass; a function of the clients alone.

    Clients of like size go together, so that little is padding.

    Args:
        client_ids: Who takes part.
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


@dataclass(frozen=True)
class LocalWork:
    """The steps that one call of local training takes.

    Attributes:
        shared_steps, private_steps: How many of each.
        schedule: In which order.
        purpose: Names the random draws.
        windows_per_step: How many of a client's windows one step reads, in turn; None: all.
    """

    shared_steps: int
    private_steps: int
    schedule: Schedule
    purpose: str
    windows_per_step: int | None

    def plan(self) -> list[tuple[bool, bool]]:
        """For each step, whether the shared and whether the private tensors move."""
        if self.schedule is Schedule.JOINT:
            longest = max(self.shared_steps, self.private_steps)
            return [(s < self.shared_steps, s < self.private_steps) for s in range(longest)]
        private = [(False, True)] * self.private_steps
        shared = [(True, False)] * self.shared_steps
        if self.schedule is Schedule.PRIVATE_AFTER:
            return shared
        return private + shared


class LocalTrainer:
    """Trains chunks of clients: from shared and private state to updates and private states.

    Args:
        config: The experiment.
        model: The many-clients model.
        histories: The clients' data.
        store: Where private states live; nothing else ever receives them.
        contract: What an update may hold.
        initial_private: Private tensors of a client that has none yet.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: CohortModel,
        histories: ClientHistories,
        store: PrivateStore,
        contract: UpdateContract,
        initial_private: InitialPrivate,
    ) -> None:
        self._config = config
        self._model = model
        self._histories = histories
        self._store = store
        self._contract = contract
        self._initial_private = initial_private
        self._local = config.federation.local

    def chunks(self, cohort: Sequence[str]) -> list[tuple[str, ...]]:
        """The cohort's chunks; equal on every process."""
        limit = self._local.windows_per_step
        size = functools.partial(self._histories.num_tokens, limit=limit)
        return plan_chunks(cohort, size, self._config.runtime.tokens_per_chunk)

    def train_chunk(
        self, chunk: Sequence[str], shared: SharedState, round_number: int
    ) -> list[ClientUpdate]:
        """Train some clients for one round; their new private states go to their store."""
        work = self.round_work()
        trains_private = any(moves for _, moves in work.plan())
        private = self._load_private(chunk, round_number - 1) if trains_private else {}
        received = self._stack_shared(shared, len(chunk))
        new, losses = self._train(chunk, {**received, **private}, work, round_number)
        if private:
            self._save_private(chunk, new, round_number)
        counts = [sum(w.num_targets for w in self._histories.windows(c)) for c in chunk]
        return [
            self._contract.build(
                client_id=client_id,
                round_number=round_number,
                num_examples=counts[c],
                loss=losses[c],
                delta={name: (new[name][c] - received[name][c]).cpu() for name in received},
            )
            for c, client_id in enumerate(chunk)
        ]

    def round_work(self) -> LocalWork:
        """The steps that a client takes in a round."""
        local = self._local
        private_on = self._config.adapters.private.enabled
        private_in_round = private_on and local.schedule is not Schedule.PRIVATE_AFTER
        return LocalWork(
            shared_steps=local.shared_local_steps,
            private_steps=local.private_local_steps if private_in_round else 0,
            schedule=local.schedule,
            purpose="round",
            windows_per_step=local.windows_per_step,
        )

    def personalise(
        self, chunk: Sequence[str], shared: SharedState, round_number: int
    ) -> dict[str, torch.Tensor]:
        """Fit private adapters to the shared state at hand, on training histories only.

        Starts from each client's newest private state up to ``round_number``. Clients that have
        nothing to train on keep what they have.

        Returns:
            Stacked private tensors [C, ...]; the store is not changed.
        """
        private = self._load_private(chunk, round_number)
        able = [c for c, client_id in enumerate(chunk) if self._histories.windows(client_id)]
        steps = self._local.personalise_steps
        if not steps or not able:
            return private
        work = LocalWork(
            shared_steps=0,
            private_steps=steps,
            schedule=Schedule.ALTERNATE,
            purpose="personalise",
            windows_per_step=self._local.personalise_windows,
        )
        fitted = {name: value[able] for name, value in private.items()}
        stacked = self.stack(shared, fitted, len(able))
        new, _ = self._train([chunk[c] for c in able], stacked, work, round_number)
        # A client whose fit went astray keeps its old adapter.
        good = torch.stack([new[name].flatten(1).isfinite().all(1) for name in private]).all(0)
        rows = torch.tensor(able, device=good.device)[good]
        return {n: value.index_copy(0, rows, new[n][good]) for n, value in private.items()}

    def personalise_tokens(self, client_id: str) -> int:
        """Padded tokens that one step of `personalise` reads of a client."""
        return self._histories.num_tokens(client_id, self._local.personalise_windows)

    def personalise_steps(self, chunk: Sequence[str]) -> int:
        """How many private steps `personalise` takes, over all clients of the chunk."""
        able = sum(bool(self._histories.windows(client_id)) for client_id in chunk)
        return self._local.personalise_steps * able

    def stack(
        self, shared: SharedState, private: Tensors, num_clients: int
    ) -> dict[str, torch.Tensor]:
        """Shared tensors repeated per client (no copy) beside stacked private ones."""
        return {**self._stack_shared(shared, num_clients), **private}

    def _train(
        self,
        chunk: Sequence[str],
        stacked: dict[str, torch.Tensor],
        work: LocalWork,
        round_number: int,
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        """Take the planned steps; returns the new tensors and the first shared step's losses."""
        shared_optimizer, private_optimizer = self._optimizers()
        # Training fits the private adapter at full strength; `weight` is a serving-time choice.
        private_on = self._config.adapters.private.enabled
        parts = Parts(shared_lora=True, private_weight=1.0 if private_on else 0.0)
        first_losses: list[float] | None = None
        batches = _BatchSource(self._config, self._histories, chunk, work, round_number)
        for step, (moves_shared, moves_private) in enumerate(work.plan()):
            shared = _leaves(stacked, private=False) if moves_shared else {}
            private = _leaves(stacked, private=True) if moves_private else {}
            current = {**stacked, **shared, **private}
            losses = self._model.losses(batches.batch(step), current, parts, batches.dropout(step))
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

    def _optimizers(self) -> tuple[StackedOptimizer, StackedOptimizer]:
        """For the shared and for the private tensors, with fresh moments."""
        local = self._local
        return (
            StackedOptimizer(local.shared_optimizer, local.shared_lr, 0.0, local.max_grad_norm),
            StackedOptimizer(
                local.private_optimizer,
                local.private_lr,
                local.private_weight_decay,
                local.max_grad_norm,
            ),
        )

    def _stack_shared(self, shared: SharedState, num_clients: int) -> dict[str, torch.Tensor]:
        device = self._model.item_texts.device
        return {
            name: value.to(device).expand(num_clients, *value.shape)
            for name, value in shared.tensors.items()
        }

    def _load_private(self, chunk: Sequence[str], at_most: int) -> dict[str, torch.Tensor]:
        states = []
        for client_id in chunk:
            state = self._store.load(client_id, at_most=at_most)
            states.append(state.tensors if state else self._initial_private(client_id))
        device = self._model.item_texts.device
        return {name: torch.stack([s[name] for s in states]).to(device) for name in states[0]}

    def _save_private(self, chunk: Sequence[str], new: Tensors, round_number: int) -> None:
        names = [name for name in new if name.startswith(PRIVATE_PREFIX)]
        for c, client_id in enumerate(chunk):
            tensors = {name: new[name][c].cpu() for name in names}
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                _log.warning("client %s: private step was not finite, kept the old one", client_id)
                continue
            self._store.save(PrivateState(client_id, round_number, tensors))


def _leaves(stacked: Tensors, private: bool) -> dict[str, torch.Tensor]:
    """The private tensors, or the shared ones, as leaves to take gradients of."""
    return {
        name: value.detach().requires_grad_()
        for name, value in stacked.items()
        if name.startswith(PRIVATE_PREFIX) is private
    }


class _BatchSource:
    """The batch of each local step: all windows, or ``windows_per_step`` of them in turn."""

    def __init__(
        self,
        config: ExperimentConfig,
        histories: ClientHistories,
        chunk: Sequence[str],
        work: LocalWork,
        round_number: int,
    ) -> None:
        self._config = config
        self._chunk = chunk
        self._size = work.windows_per_step
        self._windows = [histories.windows(client_id) for client_id in chunk]
        self._states = [histories.trunk_states(client_id) for client_id in chunk]
        self._key = (work.purpose, round_number)
        self._orders = [
            torch.randperm(len(windows), generator=self._generator("windows", client_id)).tolist()
            for client_id, windows in zip(chunk, self._windows, strict=True)
        ]
        self._whole: ChunkBatch | None = None

    def batch(self, step: int) -> ChunkBatch:
        """The batch of a step, counted from 0."""
        size = self._size
        if size is None or all(len(windows) <= size for windows in self._windows):
            self._whole = self._whole or collate(self._windows, self._states)
            return self._whole
        picks = [_turn(order, step, size) for order in self._orders]
        return collate(
            [[w[i] for i in pick] for w, pick in zip(self._windows, picks, strict=True)],
            [[s[i] for i in pick] for s, pick in zip(self._states, picks, strict=True)],
        )

    def dropout(self, step: int) -> Dropout | None:
        """Dropout of a step, one generator per client."""
        adapters = self._config.adapters
        rates = (self._config.head.dropout, adapters.shared.dropout, adapters.private.dropout)
        if not any(rates):
            return None
        return Dropout(*rates, [self._generator(f"dropout/{step}", c) for c in self._chunk])

    def _generator(self, what: str, client_id: str) -> torch.Generator:
        purpose, round_number = self._key
        return seeding.generator(self._config.seed, f"{purpose}/{what}", round_number, client_id)


def _turn(order: Sequence[int], step: int, size: int) -> list[int]:
    """``size`` entries of ``order`` starting where the previous step stopped, around the end."""
    if len(order) <= size:
        return sorted(order)
    return sorted(order[(step * size + k) % len(order)] for k in range(size))
