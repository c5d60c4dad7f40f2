"""The steps of a round under masks between nodes, as calls; `protocol.masks` has the protocol.

A node plays the part of one client: its words are the sum of those of its clients. Keys, sealed
shares and signatures are hexadecimal in the header. Words are the tensor ``words``, int32 [N], with
the bits of uint32.
"""

from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field

from pfm_llm.base.errors import NodeRefused
from pfm_llm.protocol.masks.messages import Advertisement, MaskedUpdate, Reveal
from pfm_llm.protocol.masks.shares import SHARE_BYTES
from pfm_llm.protocol.masks.words import Words
from pfm_llm.protocol.messages import (
    MOST_NODES,
    Hash,
    Key,
    Message,
    Part,
    Positive,
    TrainRequest,
    Word,
)
from pfm_llm.protocol.refusals import NodeRefusal

_TAG_BYTES = 16
_Sealed = Annotated[
    bytes,
    Field(min_length=2 * SHARE_BYTES + _TAG_BYTES, max_length=2 * SHARE_BYTES + _TAG_BYTES),
]
_Share = Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
_Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
_WORDS = "words"


class Step(Message):
    """What every step says.

    Attributes:
        agreement: `Agreement.hash`.
        round_number: The round, from 1.
    """

    agreement: Hash
    round_number: Positive


class Advertised(Part):
    """An `Advertisement`.

    Attributes:
        node: The sender.
        seal_key: X25519.
        mask_key: X25519.
        signature: Ed25519 over both and the session.
    """

    node: Word
    seal_key: Key
    mask_key: Key
    signature: _Signature

    @classmethod
    def of(cls, one: Advertisement) -> Self:
        """The message of an advertisement."""
        return cls(
            node=one.client_id,
            seal_key=one.seal_key,
            mask_key=one.mask_key,
            signature=one.signature,
        )

    @property
    def value(self) -> Advertisement:
        """The advertisement."""
        return Advertisement(self.node, self.seal_key, self.mask_key, self.signature)


class AdvertiseRequest(Step):
    """Begin a round under masks; the node forgets one that was under way.

    Attributes:
        num_nodes: How many nodes are asked; at least two thirds of them must stay to the end.
    """

    num_nodes: int = Field(ge=3, le=MOST_NODES)


class AdvertiseReply(Message):
    """The node's new keys.

    Attributes:
        keys: Signed.
        signed_by: The node's long-term key. Other nodes have it from elsewhere.
    """

    keys: Advertised
    signed_by: Key


class ShareRequest(Step):
    """Share the secrets of the round.

    Attributes:
        roster: The keys of all nodes of the round, this one among them.
    """

    roster: tuple[Advertised, ...] = Field(min_length=2, max_length=MOST_NODES)


class ShareReply(Message):
    """Sealed shares.

    Attributes:
        sealed: Each other node to what is for it.
    """

    sealed: dict[Word, _Sealed] = Field(max_length=MOST_NODES)


class MaskRequest(TrainRequest):
    """Train some clients for one round, and send the sum of their updates under masks.

    Attributes:
        received: Each other node that has shared to what it has sealed for this one.
    """

    single: Literal[False] = False
    received: dict[Word, _Sealed] = Field(max_length=MOST_NODES)


class MaskReply(Message):
    """The sum of the updates of a round, under masks.

    Attributes:
        round_number: The round of the training.
        contract_hash: Hash of the update contract.
        num_clients: How many clients are in the sum. It travels in the clear.
        tensors: ``words``, int32 [N].
    """

    round_number: Positive
    contract_hash: Hash
    num_clients: Positive

    @classmethod
    def of(cls, update: MaskedUpdate, num_clients: int) -> Self:
        """The message of some masked words, whose memory it shares."""
        return cls(
            round_number=update.round_number,
            contract_hash=update.contract_hash,
            num_clients=num_clients,
            tensors={_WORDS: torch.from_numpy(update.words.view(np.int32))},
        )

    def update(self, node: str) -> MaskedUpdate:
        """The words of a node.

        Raises:
            NodeRefused: It holds something else.
        """
        words = self.tensors.get(_WORDS)
        if words is None or len(self.tensors) > 1 or words.dtype != torch.int32:
            raise NodeRefused(NodeRefusal.MALFORMED, f"node {node}: its answer is not words alone")
        own: Words = words.numpy().view(np.uint32)
        return MaskedUpdate(node, self.round_number, self.contract_hash, own)


class ConfirmRequest(Step):
    """Sign who is left.

    Attributes:
        survivors: The nodes whose words have arrived.
    """

    survivors: tuple[Word, ...] = Field(min_length=2, max_length=MOST_NODES)


class ConfirmReply(Message):
    """The node's signature over who is left."""

    signature: _Signature


class RevealRequest(Step):
    """Reveal what takes the masks off the sum.

    Attributes:
        signatures: Node to its signature over who is left.
    """

    signatures: dict[Word, _Signature] = Field(max_length=MOST_NODES)


class RevealReply(Message):
    """Shares of one secret of each other node.

    Attributes:
        seeds: Node whose words have arrived to a share of its seed.
        keys: Node that vanished after it had shared to a share of its mask key.
    """

    seeds: dict[Word, _Share] = Field(max_length=MOST_NODES)
    keys: dict[Word, _Share] = Field(max_length=MOST_NODES)

    @classmethod
    def of(cls, reveal: Reveal) -> Self:
        """The message of a client's last one."""
        seeds, keys = (
            {node: share.to_bytes(SHARE_BYTES, "big") for node, share in shares.items()}
            for shares in (reveal.seeds, reveal.keys)
        )
        return cls(seeds=seeds, keys=keys)

    def reveal(self, node: str) -> Reveal:
        """What a node has revealed."""
        seeds, keys = (
            {owner: int.from_bytes(share, "big") for owner, share in shares.items()}
            for shares in (self.seeds, self.keys)
        )
        return Reveal(node, seeds, keys)
