"""A node's part in rounds under masks: its long-term key, and the secrets of the round under way.

The node plays one client of `protocol.masks`, whose words are the sum of those of its own clients.
The secrets of a round are in memory alone: after a restart the node has dropped out of it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.errors import ContractError, MaskError, NodeRefused
from pfm_llm.client.masked_client import MaskedClient
from pfm_llm.node.membership import Membership
from pfm_llm.node.site import SiteConfig
from pfm_llm.protocol.mask_messages import (
    Advertised,
    AdvertiseReply,
    AdvertiseRequest,
    ConfirmReply,
    ConfirmRequest,
    MaskReply,
    MaskRequest,
    RevealReply,
    RevealRequest,
    ShareReply,
    ShareRequest,
    Step,
)
from pfm_llm.protocol.masks.agreement import Identity
from pfm_llm.protocol.masks.messages import MaskedUpdate, MaskSession
from pfm_llm.protocol.masks.words import Words, no_words
from pfm_llm.protocol.messages import MaskKeys
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.publish.signing import load_key, new_key
from pfm_llm.server.masked_round import new_fixed_point, new_session

_log = logging.getLogger(__name__)
KEY_FILE = "masks.pem"
_FEWEST_PEERS = 2


@dataclass(frozen=True)
class _Round:
    """The round under way, in the federation of the hash ``agreement``."""

    agreement: str
    session: MaskSession
    player: MaskedClient


def own_key(folder: Path) -> Identity:
    """The long-term key of the node with this private folder, made where there is none.

    Raises:
        StorageError: It cannot be made or read.
    """
    path = folder / KEY_FILE
    if not path.exists():
        new_key(path)
    return load_key(path)


class Masking:
    """Answers the steps of rounds under masks, of one round at a time.

    Args:
        site: What the owner decides. The key is made at the first start with ``masks``.

    Raises:
        StorageError: The key cannot be made or read.
    """

    def __init__(self, site: SiteConfig) -> None:
        self._site = site.masks
        self._round: _Round | None = None
        if self._site is None:
            return
        self._identity = own_key(site.root)
        _log.info("masks: this node is %s, with the key %s", self._site.name, self._public.hex())

    @property
    def keys(self) -> MaskKeys | None:
        """What the node tells of its keys; None: it takes part in no round under masks."""
        if self._site is None:
            return None
        return MaskKeys(
            name=self._site.name,
            key=self._public,
            peers=self._site.keys,
            required=self._site.required,
        )

    def check_clear(self) -> None:
        """Raise `NodeRefused` if updates leave the node under masks alone."""
        if self._site is not None and self._site.required:
            raise NodeRefused(NodeRefusal.MASKS_REQUIRED, "masks.required is true")

    def drop(self) -> None:
        """Forget the round under way."""
        self._round = None

    def advertise(self, request: AdvertiseRequest, member: Membership) -> AdvertiseReply:
        """Begin a round.

        Raises:
            NodeRefused: The owner has not set masks, or names too few peers; or the server has not.
        """
        self.drop()
        if self._site is None or len(self._site.peers) < _FEWEST_PEERS:
            raise NodeRefused(NodeRefusal.NO_MASKS, "masks.peers names fewer than two nodes")
        federation, contract_hash = member.config.federation, member.run.model.contract.hash()
        if federation.masks is None:
            raise NodeRefused(NodeRefusal.MASKS, "the server has not set federation.masks")
        number, keys = request.round_number, self._site.keys
        session = new_session(federation, contract_hash, number, request.num_nodes, keys)
        player = MaskedClient(self._site.name, self._identity, session)
        self._round = _Round(request.agreement, session, player)
        return AdvertiseReply(keys=Advertised.of(player.advertise()), signed_by=self._public)

    def share(self, request: ShareRequest) -> ShareReply:
        """Share the secrets of the round.

        Raises:
            NodeRefused: The step is out of order, or the roster has keys of an unknown node.
        """
        own = self._round_of(request)
        roster = [one.value for one in request.roster]
        others = [one for one in roster if one.client_id != own.player.client_id]
        if strange := [one.client_id for one in others if not one.is_genuine(own.session)]:
            self.drop()
            raise NodeRefused(NodeRefusal.PEERS, f"masks.peers has other keys of {strange!r:.200}")
        with _refusing():
            return ShareReply(sealed=own.player.share(roster))

    def check_may_mask(self, request: MaskRequest) -> None:
        """Raise `NodeRefused` if this is not the step for `mask`; nobody need train then."""
        last = self._round_of(request).player.last_step
        if last != "share":
            raise NodeRefused(NodeRefusal.MASKS, f"asked to mask after {last}")

    def mask(self, request: MaskRequest, words: Words, num_clients: int) -> MaskReply:
        """Mask a sum, in place.

        Args:
            request: It has what the other nodes have sealed for this one.
            words: From `summed`.
            num_clients: How many clients are in it.

        Raises:
            NodeRefused: The step is out of order, or too few nodes have shared.
        """
        own = self._round_of(request)
        with _refusing():
            own.player.mask(request.received, words)
        number, contract_hash = own.session.round_number, own.session.contract_hash
        masked = MaskedUpdate(own.player.client_id, number, contract_hash, words)
        return MaskReply.of(masked, num_clients)

    def confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """Sign who is left.

        Raises:
            NodeRefused: The step is out of order, or too few are left.
        """
        with _refusing():
            return ConfirmReply(signature=self._round_of(request).player.confirm(request.survivors))

    def reveal(self, request: RevealRequest) -> RevealReply:
        """Reveal shares, and forget the round.

        Raises:
            NodeRefused: The step is out of order, or too few have signed the same.
        """
        own = self._round_of(request)
        with _refusing():
            revealed = own.player.reveal(request.signatures)
        self.drop()
        return RevealReply.of(revealed)

    def _round_of(self, request: Step | MaskRequest) -> _Round:
        own = self._round
        if own is None or own.agreement != request.agreement:
            raise NodeRefused(NodeRefusal.MASKS, "no round under masks is under way")
        if own.session.round_number != request.round_number:
            raise NodeRefused(
                NodeRefusal.MASKS,
                f"round {request.round_number}, but {own.session.round_number} is under way",
            )
        return own

    @property
    def _public(self) -> bytes:
        return self._identity.public_key().public_bytes_raw()


def summed(
    member: Membership, updates: Sequence[ClientUpdate], cohort_size: int
) -> tuple[Words, list[str]]:
    """The sum of the words of some updates, modulo 2^32.

    Args:
        member: The federation, with masks.
        updates: Those of this node's clients.
        cohort_size: How many clients all nodes are asked for.

    Returns:
        uint32 [N], and the clients in it; one whose update is not finite or too long is left out.
    """
    specs = member.run.model.contract.tensors
    fixed_point = new_fixed_point(member.config.federation, specs, cohort_size)
    total, kept = no_words(fixed_point.num_words), []
    for update in updates:
        try:
            total += fixed_point.encode(update)
        except ContractError as error:
            _log.warning("left out of the round: %s", error)
            continue
        kept.append(update.client_id)
    return total, kept


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except MaskError as error:
        raise NodeRefused(NodeRefusal.MASKS, str(error)) from error
