"""The histories of the simulated clients, and the batches of their local steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.base import seeding
from pfm_llm.base.errors import DataError
from pfm_llm.client.trunk_cache import TrunkStates
from pfm_llm.config.choices import Schedule
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.history import History
from pfm_llm.data.partition import Client, trainable
from pfm_llm.data.splits import TrainData
from pfm_llm.model.batches import ChunkBatch, Dropout, collate
from pfm_llm.text.encoding import HistoryEncoder, Window

MOST_WINDOWS = 64
"""Windows of a user in one step, where the config sets no number of them. It bounds the memory of a
step: a user with a longer history trains on this many windows in turn."""
MOST_WINDOWS_OF_SILO = 16 * MOST_WINDOWS
"""Likewise of all users of a silo."""


def most_windows(users_per_client: int) -> int:
    """Windows of a client in one step, where the config sets no number of them."""
    return min(MOST_WINDOWS * users_per_client, MOST_WINDOWS_OF_SILO)


class ClientHistories:
    """The training windows of the simulated clients, and the trunk states of these windows.

    Args:
        clients: The federation's clients.
        train: Training interactions; no held-out interaction can be reached from here.
        encoder: Renders and tokenises histories.
        states: Trunk states of windows: from a cache, or computed each time.
        like_threshold: A rating of at least this counts as a like; None: likes are no task.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        train: TrainData,
        encoder: HistoryEncoder,
        states: TrunkStates,
        like_threshold: float | None = None,
    ) -> None:
        self.clients: Mapping[str, Client] = {client.client_id: client for client in clients}
        self._client_of = {user: client.client_id for client in clients for user in client.users}
        self._train = train
        self._encoder = encoder
        self._states = states
        self._like_threshold = like_threshold
        self._windows: dict[str, tuple[Window, ...]] = {}

    @property
    def trainable(self) -> tuple[str, ...]:
        """Ids of the clients that have at least one transition to train on."""
        return trainable(tuple(self.clients.values()), self._train)

    def client_of(self, user: int) -> str:
        """The client that holds a user's data."""
        return self._client_of[user]

    def windows(self, client_id: str) -> tuple[Window, ...]:
        """A client's training windows, by user, oldest first."""
        if client_id not in self._windows:
            self._windows[client_id] = tuple(
                window
                for user in self.clients[client_id].users
                for window in self._encoder.training_windows(self._known(user))
            )
        return self._windows[client_id]

    def later_windows(self, client_id: str, history: History) -> tuple[Window, ...]:
        """The further windows of a history that extends the training history.

        Args:
            client_id: A client of one user.
            history: The training history and the interactions after it.

        Raises:
            DataError: The history does not begin with the training history.
        """
        num_known = len(self.history(client_id))
        whole = self.history(client_id, history)
        return self._encoder.training_windows(whole, num_known) if len(whole) > num_known else ()

    def history(self, client_id: str, shown: History | None = None) -> History:
        """The history of a client of one user, with its likes if ``like`` is a task.

        Args:
            client_id: The client.
            shown: The training history and the interactions after it; None: the training history.

        Raises:
            DataError: ``shown`` does not begin with the training history.
        """
        (user,) = self.clients[client_id].users
        known = self._known(user)
        if shown is None:
            return known
        if not np.array_equal(shown.items[: len(known)], known.items):
            raise DataError(f"user {user}: a history that does not begin with the training history")
        return shown.labelled(self._like_threshold)

    def _known(self, user: int) -> History:
        return self._train.interactions.history_of(user).labelled(self._like_threshold)

    def trunk_states(self, client_id: str, later: Sequence[Window] = ()) -> list[torch.Tensor]:
        """Trunk states [T, d] of each training window of a client, and of `later_windows`.

        Each later window has a cache entry of its own, which it shares with the query that reads
        the same items.
        """
        states = self._states(self.windows(client_id), client_id)
        return states + [self._states([window], client_id)[0] for window in later]

    def newest(
        self, client_id: str, history: History, num_known: int = 0
    ) -> tuple[tuple[Window, ...], list[torch.Tensor]]:
        """The newest windows of a client's history, at most `MOST_WINDOWS`, and their trunk states.

        Args:
            client_id: The client, whose private folder keeps the states.
            history: A stretch of its history, from the first item on.
            num_known: Number of first items that are no targets.
        """
        windows = self._encoder.training_windows(history, num_known)[-MOST_WINDOWS:]
        return windows, self._states(windows, client_id)

    def num_tokens(self, client_id: str, limit: int | None = None) -> int:
        """Padded tokens of at most ``limit`` windows of a client: number times longest."""
        windows = self.windows(client_id)
        rows = len(windows) if limit is None else min(limit, len(windows))
        return rows * max((len(window.tokens) for window in windows), default=0)


@dataclass(frozen=True)
class LocalWork:
    """The steps that one call of local training takes.

    Attributes:
        shared_steps, private_steps: Number of steps on the shared and on the private tensors.
        schedule: The order of the steps.
        purpose: Name of the random draws.
        windows_per_step: The most windows of a client in one step; more are read in turn.
    """

    shared_steps: int
    private_steps: int
    schedule: Schedule
    purpose: str
    windows_per_step: int

    def plan(self) -> list[tuple[bool, bool]]:
        """For each step, whether it changes the shared and the private tensors."""
        if self.schedule is Schedule.JOINT:
            longest = max(self.shared_steps, self.private_steps)
            return [(s < self.shared_steps, s < self.private_steps) for s in range(longest)]
        private = [(False, True)] * self.private_steps
        shared = [(True, False)] * self.shared_steps
        if self.schedule is Schedule.PRIVATE_AFTER:
            return shared
        return private + shared


class BatchSource:
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
        if all(len(windows) <= size for windows in self._windows):
            self._whole = self._whole or self._collate(self._windows, self._states)
            return self._whole
        picks = [_turn(order, step, size) for order in self._orders]
        return self._collate(
            [[w[i] for i in pick] for w, pick in zip(self._windows, picks, strict=True)],
            [[s[i] for i in pick] for s, pick in zip(self._states, picks, strict=True)],
        )

    def _collate(
        self, windows: Sequence[Sequence[Window]], states: Sequence[Sequence[torch.Tensor]]
    ) -> ChunkBatch:
        return collate(windows, states, horizon=self._config.federation.local.horizon)

    def dropout(self, step: int) -> Dropout | None:
        """Dropout of a step, one generator per client."""
        adapters = self._config.adapters
        head, taste = self._config.head.dropout, adapters.private.taste.dropout
        taste = head if taste is None else taste
        rates = (head, taste, adapters.shared.dropout, adapters.private.dropout)
        items = self._config.head.item_dropout
        if not any((*rates, items)):
            return None
        generators = [self._generator(f"dropout/{step}", c) for c in self._chunk]
        return Dropout(*rates, generators=generators, items=items)

    def _generator(self, what: str, client_id: str) -> torch.Generator:
        purpose, round_number = self._key
        return seeding.generator(self._config.seed, f"{purpose}/{what}", round_number, client_id)


def _turn(order: Sequence[int], step: int, size: int) -> list[int]:
    """The next ``size`` entries of ``order``, which is read as a circle, at a step from 0."""
    if len(order) <= size:
        return sorted(order)
    return sorted(order[(step * size + k) % len(order)] for k in range(size))
