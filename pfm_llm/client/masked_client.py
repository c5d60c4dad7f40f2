"""A client's side of a round under masks; `protocol.masks` describes the protocol."""

import secrets
from collections.abc import Collection, Mapping, Sequence

from pfm_llm.base.errors import MaskError
from pfm_llm.protocol.masks import shares
from pfm_llm.protocol.masks.agreement import (
    KEY_BYTES,
    Draw,
    Identity,
    KeyPair,
    channel,
    opened,
    own_mask,
    pair_mask,
    sealed,
)
from pfm_llm.protocol.masks.messages import (
    Advertisement,
    MaskSession,
    Reveal,
    confirmation,
    roster_digest,
)
from pfm_llm.protocol.masks.neighbours import Graph, mask_graph, reaches
from pfm_llm.protocol.masks.words import Words, add_masks


class MaskedClient:
    """One client in one round. Its methods are called once each, in the order below.

    Each takes what the server sends and returns what the server gets. None trusts the server, which
    may send anything: a client that is told something impossible raises, and sends nothing more.

    Args:
        client_id: Its id.
        identity: Its long-term key; the others know the public part from elsewhere.
        session: The round.
        draw: Secret randomness; fixed in tests alone.
    """

    def __init__(
        self,
        client_id: str,
        identity: Identity,
        session: MaskSession,
        draw: Draw = secrets.token_bytes,
    ) -> None:
        self._id = client_id
        self._identity = identity
        self._session = session
        self._draw = draw
        self._seal, self._mask = KeyPair(draw(KEY_BYTES)), KeyPair(draw(KEY_BYTES))
        self._seed = draw(KEY_BYTES)
        self._done = "nothing"
        self._roster: dict[str, Advertisement] = {}
        self._channels: dict[str, bytes] = {}  # the key that each other client shares with it
        self._digest = b""
        self._graph: Graph = {}
        self._own_shares = b""
        self._received: dict[str, bytes] = {}
        self._survivors: frozenset[str] = frozenset()

    @property
    def client_id(self) -> str:
        """Its id."""
        return self._id

    @property
    def last_step(self) -> str:
        """The name of the method that was called last; ``nothing`` before the first."""
        return self._done

    def advertise(self) -> Advertisement:
        """The client's two public keys of the round, signed."""
        self._take_step("advertise", after="nothing")
        keys = self._seal.public, self._mask.public
        return Advertisement.signed(self._session, self._id, keys, self._identity)

    def share(self, roster: Sequence[Advertisement]) -> dict[str, bytes]:
        """Share the seed and the mask key among all, so that the others can do without this client.

        Args:
            roster: The advertisements of the round.

        Returns:
            For each other client a share of both, sealed for it.

        Raises:
            MaskError: Keys were not signed by the clients they are said to be of, or belong to
                another round; or too few clients are left.
        """
        self._take_step("share", after="advertise")
        self._check_roster(roster)
        ordered = sorted(roster, key=lambda one: one.client_id)
        self._roster = {one.client_id: one for one in ordered}
        self._digest = roster_digest(self._session, ordered)
        number = self._session.num_neighbours
        self._graph = mask_graph(tuple(self._roster), number, self._digest)
        threshold, count = self._session.threshold, len(ordered)
        pieces = zip(
            self._roster,
            shares.split(self._seed, threshold, count, self._draw),
            shares.split(self._mask.private, threshold, count, self._draw),
            strict=True,
        )
        sent = {}
        for other, *both in pieces:
            content = b"".join(share.to_bytes(shares.SHARE_BYTES, "big") for share in both)
            if other == self._id:
                self._own_shares = content
                continue
            secret = self._seal.agree(self._roster[other].seal_key)
            self._channels[other] = channel(self._session.context, secret, self._id, other)
            sent[other] = sealed(self._channels[other], content, self._id, other)
        return sent

    def mask(self, received: Mapping[str, bytes], words: Words) -> Words:
        """Mask the words of the update, in place.

        Args:
            received: The sealed shares for this client, by sender.
            words: The encoded update, uint32 [N].

        Returns:
            ``words``, which without the client's seed and keys are uniform.

        Raises:
            MaskError: Too few clients have shared.
        """
        self._take_step("mask", after="share")
        self._received = dict(received)
        sharers = self._sharers
        if not sharers <= self._roster.keys():
            raise MaskError("shares came from a client that has not advertised keys")
        self._session.check_enough(sharers, "shared their secrets")
        context = self._session.context
        masks = [(own_mask(context, self._id, self._seed), 1)]
        for other in sorted(self._graph[self._id] & sharers):
            secret = self._mask.agree(self._roster[other].mask_key)
            masks.append(pair_mask(context, secret, self._id, other))
        add_masks(words, masks)
        return words

    def confirm(self, survivors: Collection[str]) -> bytes:
        """Sign whose words arrived. The client does so once, for one set of clients.

        Args:
            survivors: The clients whose words the server has.

        Raises:
            MaskError: The set is impossible or too small.
        """
        self._take_step("confirm", after="mask")
        alive = frozenset(survivors)
        if self._id not in alive or not alive <= self._sharers:
            raise MaskError(
                f"client {self._id!r:.80}: the server claims words of a client that shared "
                "nothing, or not to have this client's; nothing is revealed"
            )
        self._session.check_enough(alive, "sent their words")
        self._survivors = alive
        return self._identity.sign(self._message)

    def reveal(self, confirmations: Mapping[str, bytes]) -> Reveal:
        """Shares of the seeds of those whose words arrived, and of the keys of those who vanished.

        Args:
            confirmations: What the others signed, by client.

        Raises:
            MaskError: Too few clients have signed the same, or the masks do not join all of them: a
                part of the sum would come out. Nothing is revealed.
        """
        self._take_step("reveal", after="confirm")
        alive, message = self._survivors, self._message
        others = {
            client: signature
            for client, signature in confirmations.items()
            if client in alive and client != self._id
        }
        agree = {self._id} | {c for c, s in others.items() if self._session.is_from(c, s, message)}
        self._session.check_enough(agree, "confirmed who is left")
        if not reaches(self._graph, alive, agree):
            raise MaskError(
                f"round {self._session.round_number}: masks do not join all clients that are left, "
                "so the sum of some of them would come out; the round is lost. Raise "
                "federation.masks.neighbours"
            )
        seeds, keys = {}, {}
        for owner in sorted(self._sharers):
            seed_share, key_share = self._shares_of(owner)
            if owner in alive:
                seeds[owner] = seed_share
            else:
                keys[owner] = key_share
        return Reveal(self._id, seeds, keys)

    @property
    def _sharers(self) -> frozenset[str]:
        return frozenset(self._received) | {self._id}

    @property
    def _message(self) -> bytes:
        """What the client and all that agree with it sign."""
        return confirmation(self._digest, self._sharers, self._survivors)

    def _take_step(self, step: str, after: str) -> None:
        if self._done != after:
            raise MaskError(
                f"client {self._id!r:.80} was asked to {step} after {self._done}; it "
                "does each thing once in a round"
            )
        self._done = step

    def _check_roster(self, roster: Sequence[Advertisement]) -> None:
        session, ids = self._session, [one.client_id for one in roster]
        own = [one for one in roster if one.client_id == self._id]
        keys = [(one.seal_key, one.mask_key) for one in own]
        if keys != [(self._seal.public, self._mask.public)] or len(set(ids)) != len(ids):
            raise MaskError(
                f"client {self._id!r:.80}: the server sent other keys than this client's as its "
                "own, or a client twice"
            )
        if len(ids) > session.cohort_size:
            raise MaskError(f"{len(ids)} clients in a cohort of {session.cohort_size}")
        for one in roster:
            if one.client_id != self._id and not one.is_genuine(session):
                raise MaskError(
                    f"the keys of client {one.client_id!r:.80} are not signed by it for round "
                    f"{session.round_number}; nothing is sent"
                )
        session.check_enough(ids, "advertised keys")

    def _shares_of(self, owner: str) -> tuple[int, int]:
        """This client's shares of somebody's seed and mask key."""
        content = self._own_shares
        if owner != self._id:
            content = opened(self._channels[owner], self._received[owner], owner, self._id)
        size = shares.SHARE_BYTES
        return int.from_bytes(content[:size], "big"), int.from_bytes(content[size:], "big")
