"""Rounds under masks with made-up words: each step can be looked at, and bent."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from pfm_llm.client.masked_client import MaskedClient
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.masks.agreement import Draw, Identity
from pfm_llm.protocol.masks.messages import Advertisement, MaskedUpdate, MaskSession, Reveal
from pfm_llm.protocol.masks.words import FixedPoint, Words
from pfm_llm.server.masked_round import MaskedRound

CONTRACT = "hash of the contract"


def drawing(label: str) -> Draw:
    """Bytes that are the same each time: SHA-256 of a label and a counter."""
    counter = itertools.count()

    def draw(size: int) -> bytes:
        text = b""
        while len(text) < size:
            text += hashlib.sha256(f"{label}/{next(counter)}".encode()).digest()
        return text[:size]

    return draw


def identity(client_id: str) -> Identity:
    """A long-term key that follows from the id."""
    return Identity.from_private_bytes(drawing(f"identity of {client_id}")(32))


def clients_of(count: int) -> tuple[str, ...]:
    return tuple(f"user-{number}" for number in range(count))


def session_of(
    count: int, round_number: int = 1, neighbours: int = 12, contract: str = CONTRACT
) -> MaskSession:
    """A round of so many clients, whose long-term keys all know."""
    keys = {c: identity(c).public_key().public_bytes_raw() for c in clients_of(count)}
    return MaskSession(contract, round_number, count, neighbours, keys)


def fixed_point_of(count: int, numbers: int = 6) -> FixedPoint:
    """Updates of so many numbers in one tensor, of norm at most 1."""
    return FixedPoint({"head.item_bias": TensorSpec((numbers,))}, 1.0, count, 1000, False)


@dataclass
class Play:
    """A round, and the clients in it.

    Attributes:
        session: The round.
        numbers: Numbers of an update; there are two words more.
        label: What the clients' secret randomness follows from.
    """

    session: MaskSession
    numbers: int = 6
    label: str = ""
    server: MaskedRound = field(init=False)
    players: dict[str, MaskedClient] = field(init=False)
    received: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = clients_of(self.session.cohort_size)
        fixed_point = fixed_point_of(self.session.cohort_size, self.numbers)
        self.server = MaskedRound(self.session, ids, fixed_point)
        self.players = {
            c: MaskedClient(c, identity(c), self.session, drawing(f"{self.label}{c}")) for c in ids
        }

    def share(
        self, change: Callable[[list[Advertisement]], list[Advertisement]] = lambda sent: sent
    ) -> None:
        """Advertise and share; ``change`` is what the server does to the roster."""
        roster = change(self.server.open(p.advertise() for p in self.players.values()))
        self.received = self.server.deliver(
            {client_id: player.share(roster) for client_id, player in self.players.items()}
        )

    def message(self, client_id: str, words: Words) -> MaskedUpdate:
        """A client's masked words."""
        masked = self.players[client_id].mask(self.received[client_id], words.copy())
        session = self.session
        return MaskedUpdate(client_id, session.round_number, session.contract_hash, masked)

    def send(self, words: dict[str, Words]) -> tuple[str, ...]:
        """Mask and add; who has sent."""
        for client_id, own in words.items():
            self.server.add(self.message(client_id, own))
        return self.server.close()

    def reveals(self, survivors: Sequence[str], silent: Collection[str] = ()) -> list[Reveal]:
        """The last two messages of all survivors but those who fall silent."""
        left = [self.players[client_id] for client_id in survivors if client_id not in silent]
        names = [client_id for client_id in survivors if client_id not in silent]
        signed = dict(zip(names, [p.confirm(survivors) for p in left], strict=True))
        return [player.reveal(signed) for player in left]


def random_words(count: int, size: int, seed: int = 0) -> dict[str, Words]:
    """Any words at all, by client."""
    source = np.random.default_rng(seed)
    ids = clients_of(count)
    return {c: source.integers(0, 2**32, size, dtype=np.uint32) for c in ids}


def uniform(words: Words) -> float:
    """P of chi-squared that the bytes of words are uniform, each of the four by itself."""
    own = words.view(np.uint8).reshape(-1, 4)
    counts = np.stack([np.bincount(own[:, place], minlength=256) for place in range(4)])
    expected = len(words) / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, 4 * 255))
