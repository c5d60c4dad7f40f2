"""The calls of a node as values, and their bytes: JSON for a header, safetensors for tensors.

Nothing is pickled, so what arrives is data and never code. Numbers must be finite, keys known and
types exact; whatever else arrives is refused as malformed. No message has a field for a private
tensor, a user's id, a path or a title. The one exception is `ForgetRequest`, which goes into a node
and names a user.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save

from pfm_llm.base.errors import CorruptFileError, NodeRefused
from pfm_llm.base.files import parse_tensors
from pfm_llm.protocol.agreement import Agreement
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.types import ClientUpdate, Mode, NodeUpdate, Tensors

PROTOCOL = 1
"""The version of these messages."""

MOST_SLOTS = 1_000_000
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Slot = Annotated[int, Field(ge=0, lt=MOST_SLOTS)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=100)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
MOST_NODES = 1000
_Message = TypeVar("_Message", bound="Message")


class Part(BaseModel):
    """A strict model: keys known, types exact, numbers finite; bytes are hexadecimal in JSON."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_bytes="hex",
        val_json_bytes="hex",
    )


class Message(Part):
    """A request to a node, or its answer.

    Attributes:
        tensors: Name to tensor on the CPU; the body of the message.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    tensors: dict[str, torch.Tensor] = Field(default={}, exclude=True)


class Agreed(Part):
    """The hashes of an `Agreement`."""

    contract: Hash
    tensors: Hash
    settings: Hash

    @property
    def value(self) -> Agreement:
        """The agreement."""
        return Agreement(self.contract, self.tensors, self.settings)


class MaskKeys(Part):
    """The long-term keys (Ed25519, public) with which nodes sign their part of masked rounds.

    Attributes:
        name: The node's name for the other nodes.
        key: Its own.
        peers: Name of each other node that it knows to its key.
        required: Whether its owner lets sums leave under masks alone.
    """

    name: Word
    key: Key
    peers: dict[Word, Key] = Field(max_length=MOST_NODES)
    required: bool


class AboutRequest(Message):
    """What the node is; with settings also: take part in this federation.

    Attributes:
        settings: The settings that the server decides; None: only tell.
        tensors: With settings: whitening, codes, and the shared tensors that nobody trains.
    """

    settings: dict[str, Any] | None = None


class AboutReply(Message):
    """What a node tells of itself.

    Attributes:
        version: Version of pfm_llm.
        min_users: Its owner's least number of users in a sum.
        single_updates: Whether its owner allows updates of single clients.
        agreed: The hashes of the federation that it takes part in; None: none.
        num_clients: How many clients it has for it; their slots are 0 to this number.
        dtype: The dtype in which its backbone computes there.
        masks: Its keys for rounds under masks; None: its owner has not set ``masks``.
    """

    version: Word
    min_users: Positive
    single_updates: bool
    agreed: Agreed | None = None
    num_clients: Count = 0
    dtype: Word = ""
    masks: MaskKeys | None = None


class TrainRequest(Message):
    """Train some clients for one round.

    Attributes:
        agreement: `Agreement.hash`.
        round_number: The round, from 1.
        slots: The clients, each once.
        cohort_size: Number of clients that all nodes are asked for in this round.
        single: Whether the updates are wanted one by one; else their weighted sum.
        oldest_commit: Private states that only rounds before this one need may be deleted.
        discard_newer: Delete private states of rounds after this one first; None: there are none.
        tensors: The shared tensors of the contract, as they are sent.
    """

    agreement: Hash
    round_number: Positive
    slots: tuple[_Slot, ...] = Field(min_length=1)
    cohort_size: Positive
    single: bool = False
    oldest_commit: Count = 0
    discard_newer: Count | None = None


class UpdateHead(Part):
    """The numbers of an update, or of a sum of updates.

    Attributes:
        slot: The client; None: a sum over clients.
        num_clients: How many clients are in it.
        num_examples: Their examples.
        loss: Their weighted mean loss, in nats, before the first step.
    """

    slot: _Slot | None
    num_clients: Positive
    num_examples: Positive
    loss: float


class TrainReply(Message):
    """The sum of the updates of a round, or each of them.

    Attributes:
        round_number: The round of the training.
        contract_hash: Hash of the update contract.
        updates: One for a sum, or one a client; update ``i`` has the tensors ``<i>/<name>``.
        tensors: The weighted sum of the changes, or each client's change.
    """

    round_number: Positive
    contract_hash: Hash
    updates: tuple[UpdateHead, ...] = Field(min_length=1)

    def deltas(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each update.

        Raises:
            NodeRefused: A tensor belongs to no update.
        """
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.updates]
        for key, tensor in self.tensors.items():
            index, separator, name = key.partition("/")
            known = separator and index.isdecimal() and len(index) < 8
            if not known or int(index) >= len(found):
                raise NodeRefused(NodeRefusal.MALFORMED, f"no update has a tensor {key!r:.80}")
            found[int(index)][name] = tensor
        return found

    def node_update(self, node: str) -> NodeUpdate:
        """The sum of a node.

        Raises:
            NodeRefused: It holds no single sum.
        """
        head = self.updates[0]
        if len(self.updates) != 1 or head.slot is not None:
            raise NodeRefused(NodeRefusal.MALFORMED, f"node {node}: its answer is not one sum")
        return NodeUpdate(
            node_id=node,
            round_number=self.round_number,
            contract_hash=self.contract_hash,
            num_clients=head.num_clients,
            num_examples=head.num_examples,
            loss=head.loss,
            delta=self.deltas()[0],
        )

    def client_updates(self, client_ids: Mapping[int, str]) -> list[ClientUpdate]:
        """The updates one by one.

        Args:
            client_ids: Slot to id, for the slots that were asked.

        Raises:
            NodeRefused: It holds a sum, or a client that was not asked.
        """
        if any(head.slot not in client_ids for head in self.updates):
            raise NodeRefused(NodeRefusal.MALFORMED, "an update is not of a slot that was asked")
        return [
            ClientUpdate(
                client_id=client_ids[head.slot],  # type: ignore[index]
                round_number=self.round_number,
                contract_hash=self.contract_hash,
                num_examples=head.num_examples,
                loss=head.loss,
                delta=delta,
            )
            for head, delta in zip(self.updates, self.deltas(), strict=True)
        ]


class EvaluateRequest(Message):
    """Measure a shared state on the node's users, or count what they have met.

    Attributes:
        agreement: `Agreement.hash`.
        round_number: The round of the shared state.
        split: ``validation`` or ``test``.
        modes: The modes to measure; none: only count the training interactions of each item.
        ks: Lengths of the lists.
        private_weight: Factor on the private part.
        tensors: The shared tensors of the contract, as they are sent, each as ``shared/<name>``;
            and ``counts`` [I], the interactions of each item over all nodes, where popularity is
            to be measured beside.
    """

    agreement: Hash
    round_number: Count
    split: Annotated[str, Field(pattern=r"^(validation|test)$")] = "validation"
    modes: tuple[Mode, ...] = ()
    ks: tuple[Positive, ...] = (10,)
    private_weight: float = Field(1.0, ge=0, le=1.5)


class Figure(Part):
    """Sums over the users of a node. They are withheld where there are too few.

    Attributes:
        name: What is summed up, such as ``shared_only`` or ``shared_private-shared_only``.
        metric: Such as ``ndcg``.
        k: Length of the list.
        total: The sum of the value of each user.
        squares: The sum of its squares.
        num_users: Number of users.
    """

    name: Word
    metric: Word
    k: Positive
    total: float
    squares: float = Field(ge=0)
    num_users: Positive


class EvaluateReply(Message):
    """The figures of a node, or its counts.

    Attributes:
        figures: Empty where the node has too few users.
        num_users: Users that the figures or counts are over; 0 where they are withheld.
        tensors: ``counts`` float64 [I], where they were asked for and are not withheld.
    """

    figures: tuple[Figure, ...] = ()
    num_users: Count = 0


class ForgetRequest(Message):
    """Delete all that the node keeps of a user, and train that user no more.

    Attributes:
        user: The user's id in the node's data.
    """

    user: Annotated[str, Field(min_length=1, max_length=1000)]


class ForgetReply(Message):
    """It is the same whether there was such a user or not."""


def encode(message: Message) -> tuple[bytes, bytes]:
    """Header and body of a message."""
    tensors = {name: tensor.contiguous() for name, tensor in message.tensors.items()}
    return message.model_dump_json().encode(), save(tensors) if tensors else b""


def decode(kind: type[_Message], header: bytes, body: bytes) -> _Message:
    """The message of a header and a body.

    Raises:
        NodeRefused: They are no message of the kind.
    """
    try:
        message = kind.model_validate_json(header)
        tensors: Tensors = parse_tensors(body) if body else {}
    except (ValidationError, CorruptFileError) as error:
        raise NodeRefused(NodeRefusal.MALFORMED, f"no {kind.__name__}: {error}") from error
    return message.model_copy(update={"tensors": dict(tensors)})
