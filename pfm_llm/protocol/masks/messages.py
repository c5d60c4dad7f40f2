"""The messages of a masked round, and what all of its members know beforehand."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pfm_llm.base.errors import MaskError
from pfm_llm.protocol.masks.agreement import Identity, digest, is_signed, packed
from pfm_llm.protocol.masks.words import Words


@dataclass(frozen=True)
class MaskSession:
    """A masked round, as its clients and the server know it.

    Attributes:
        contract_hash: Hash of the update contract.
        round_number: The round, from 1.
        cohort_size: Number n of clients that are asked, at least 3.
        num_neighbours: With how many others a client masks; see `masks.neighbours`.
        verify_keys: Client to its Ed25519 public key, 32 bytes. A client has this from somewhere
            else than the server: whoever may name keys here can read an update.
    """

    contract_hash: str
    round_number: int
    cohort_size: int
    num_neighbours: int
    verify_keys: Mapping[str, bytes]

    @property
    def threshold(self) -> int:
        """T = n - floor(n / 3): the fewest clients whose sum is ever unmasked.

        As 2 t > n + c for c < n / 3 clients that collude with it, a server that tells clients
        different things gets neither both secrets of anybody nor two sums (Bonawitz et al. 2017,
        section 6.2).
        """
        return self.cohort_size - self.cohort_size // 3

    @functools.cached_property
    def context(self) -> bytes:
        """32 bytes that enter every key and signature, so that none counts in another round."""
        numbers = (self.round_number, self.cohort_size, self.num_neighbours)
        return digest("pfm_llm masks 1", self.contract_hash, *map(str, numbers))

    def check_enough(self, clients: Iterable[str], what: str) -> None:
        """Raise `MaskError` if fewer than the threshold are left."""
        number = len(set(clients))
        if number < self.threshold:
            raise MaskError(
                f"round {self.round_number}: {number} of {self.cohort_size} clients {what}, and "
                f"the masks come off with at least {self.threshold}; the round is lost"
            )

    def is_from(self, client_id: str, signature: bytes, message: bytes) -> bool:
        """Whether a client has signed a message."""
        key = self.verify_keys.get(client_id)
        return key is not None and is_signed(key, signature, message)


@dataclass(frozen=True)
class Advertisement:
    """The first message of a client: two new public keys, signed.

    Attributes:
        client_id: The sender.
        seal_key: X25519, 32 bytes; others seal shares with it.
        mask_key: X25519, 32 bytes; others mask with it.
        signature: Ed25519 over these and the session's context.
    """

    client_id: str
    seal_key: bytes
    mask_key: bytes
    signature: bytes

    @classmethod
    def signed(
        cls, session: MaskSession, client_id: str, keys: tuple[bytes, bytes], identity: Identity
    ) -> "Advertisement":
        """Sign the keys (to seal, to mask) of a client."""
        signature = identity.sign(_advertised(session, client_id, *keys))
        return cls(client_id, *keys, signature)

    def is_genuine(self, session: MaskSession) -> bool:
        """Whether the client itself advertised these keys in this round."""
        message = _advertised(session, self.client_id, self.seal_key, self.mask_key)
        return session.is_from(self.client_id, self.signature, message)


@dataclass(frozen=True)
class MaskedUpdate:
    """The update of one client under its masks; without one of the masks it is uniform.

    Attributes:
        client_id: The sender.
        round_number: The round.
        contract_hash: Hash of the update contract.
        words: uint32, as many as `FixedPoint.num_words`.
    """

    client_id: str
    round_number: int
    contract_hash: str
    words: Words


@dataclass(frozen=True)
class Reveal:
    """The last message of a client: its shares of one secret of each of the others.

    Attributes:
        client_id: The sender.
        seeds: Client whose words arrived to a share of its seed.
        keys: Client that vanished after it had shared to a share of its mask key.
    """

    client_id: str
    seeds: Mapping[str, int]
    keys: Mapping[str, int]


def roster_digest(session: MaskSession, roster: Sequence[Advertisement]) -> bytes:
    """32 bytes that depend on every key of a round; the roster is in order of client ids."""
    parts = [(one.client_id, one.seal_key, one.mask_key) for one in roster]
    return digest(session.context, *(packed(*part) for part in parts))


def confirmation(roster: bytes, sharers: Iterable[str], survivors: Iterable[str]) -> bytes:
    """What a client signs before it reveals anything.

    Args:
        roster: From `roster_digest`; it has the signer's new keys, so nobody can sign it earlier.
        sharers: The clients that shared their secrets.
        survivors: Those of them whose words arrived.
    """
    return digest("confirm", roster, packed(*sorted(sharers)), packed(*sorted(survivors)))


def _advertised(session: MaskSession, client_id: str, seal_key: bytes, mask_key: bytes) -> bytes:
    return packed("advertise", session.context, client_id, seal_key, mask_key)
