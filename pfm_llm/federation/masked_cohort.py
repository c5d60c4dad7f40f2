"""A cohort of this machine under masks: its clients mask, and the server adds up.

Each client is an object with keys of its own that only sends messages, and the server's side gets
no update in the clear. There is no adversary inside one process, so nobody is protected here: this
shows the arithmetic, what it costs, and what dropouts do.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from pfm_llm.base.errors import ContractError, MaskError
from pfm_llm.base.processes import Processes
from pfm_llm.client.masked_client import MaskedClient
from pfm_llm.protocol.masks.agreement import Identity
from pfm_llm.protocol.masks.messages import MaskedUpdate
from pfm_llm.protocol.types import ClientUpdate, Refusal
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.masked_round import MaskedRound
from pfm_llm.server.server import Server

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
Players = Mapping[str, MaskedClient]
"""The clients of a round that this process plays, by id."""
Refused = dict[str, tuple[str, str]]
"""Client without an update to what was wrong, and the `Refusal`."""
Train = Callable[[Sequence[str]], Sequence[ClientUpdate]]
"""Trains a chunk of clients."""


class MaskedCohort:
    """Runs rounds under masks among simulated clients.

    Args:
        server: The server.
        processes: The processes that share a cohort; each plays the clients of its chunks.

    Attributes:
        seconds: What this process has spent on masks.
    """

    def __init__(self, server: Server, processes: Processes) -> None:
        self._server = server
        self._processes = processes
        self._identities: dict[str, Identity] = {}  # of all clients that this process has played
        self.seconds = 0.0

    def train(
        self, absent: Sequence[str], chunks: Sequence[Sequence[str]], train: Train
    ) -> Aggregator:
        """One round.

        Args:
            absent: Clients of the cohort that vanish once they have shared their secrets.
            chunks: All others.
            train: Trains a chunk.

        Returns:
            The cohort's updates, of which only the sum is known. If the masks do not come off, all
            are refused, and the round is lost.
        """
        cohort = [*absent, *(client_id for chunk in chunks for client_id in chunk)]
        own = [chunk for _, chunk in self._processes.share(chunks)]
        played = [client_id for chunk in own for client_id in chunk]
        played += absent if self._processes.is_main else []
        refused: Refused = {c: (f"client {c!r:.80}: no answer", Refusal.NO_ANSWER) for c in absent}
        updates = self._server.new_aggregator()
        try:
            with self._timed():
                masked, players, received = self._opened(played)
            refused |= self._masked(masked, players, received, own, train)
            with self._timed():
                self._unmasked(updates, masked, players)
        except (MaskError, ContractError) as error:
            _LOG.warning("%s", error)
            reason = error.reason if isinstance(error, ContractError) else Refusal.MASKED
            lost = {client_id: (str(error), reason) for client_id in cohort}
            refused = lost | refused
        for problem, reason in refused.values():
            updates.refuse(problem, reason)
        return updates

    def _opened(
        self, played: Sequence[str]
    ) -> tuple[MaskedRound, Players, dict[str, dict[str, bytes]]]:
        """A round whose clients have shared their secrets, and what each has received."""
        for client_id in played:
            if client_id not in self._identities:
                self._identities[client_id] = Identity.generate()
        own = {c: self._identities[c] for c in played}
        keys = {c: key.public_key().public_bytes_raw() for c, key in own.items()}
        masked = self._server.new_masked_round(self._everywhere(keys))
        players = {c: MaskedClient(c, key, masked.session) for c, key in own.items()}
        roster = masked.open(self._each(players, MaskedClient.advertise).values())
        sent = self._each(players, lambda player: player.share(roster))
        return masked, players, masked.deliver(sent)

    def _masked(
        self,
        masked: MaskedRound,
        players: Players,
        received: Mapping[str, Mapping[str, bytes]],
        chunks: Sequence[Sequence[str]],
        train: Train,
    ) -> Refused:
        """Train, and add up what the clients send; who sends nothing."""
        refused: Refused = {}
        with self._processes.together():
            for chunk in chunks:
                for update in train(chunk):
                    client_id = update.client_id
                    with self._timed():
                        try:
                            words = masked.fixed_point.encode(update)
                        except ContractError as error:
                            _LOG.warning("round %d: %s", update.round_number, error)
                            refused[client_id] = str(error), error.reason
                            continue
                        words = players[client_id].mask(received[client_id], words)
                        masked.add(
                            MaskedUpdate(
                                client_id, update.round_number, update.contract_hash, words
                            )
                        )
        index = self._processes.index
        everybody = self._processes.gather([(index, (masked, refused))])
        masked.merge(other for i, (other, _) in enumerate(everybody) if i != index)
        return {c: problem for _, some in everybody for c, problem in some.items()}

    def _unmasked(self, updates: Aggregator, masked: MaskedRound, players: Players) -> None:
        """Take the masks off the sum, and add it to the updates."""
        survivors = masked.close()
        left = {c: player for c, player in players.items() if c in survivors}
        signed = self._each(left, lambda player: player.confirm(survivors))
        reveals = self._each(left, lambda player: player.reveal(signed))
        found = masked.unmask(reveals.values())
        self._server.receive_masked(updates, found, len(survivors), survivors)

    def _each(self, players: Players, act: Callable[[MaskedClient], T]) -> dict[str, T]:
        """The messages of all clients, of every process."""
        with self._processes.together():
            own = {client_id: act(player) for client_id, player in players.items()}
        return self._everywhere(own)

    def _everywhere(self, own: dict[str, T]) -> dict[str, T]:
        pieces = self._processes.gather([(self._processes.index, own)])
        return {client_id: value for piece in pieces for client_id, value in piece.items()}

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
