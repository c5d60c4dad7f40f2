"""The states and messages of the federation, kept apart by type.

`SharedState` and `PrivateState` are unrelated on purpose: no function accepts both, and
`ClientUpdate` has no field that could hold a private tensor. Tensor names say where a tensor
belongs:

=====================  ===================================  ==========================
name                   shape                                lives in
=====================  ===================================  ==========================
``lora.<module>.A``    [rank, in_features]                  shared state
``lora.<module>.B``    [out_features, rank]                 shared state
``head.<parameter>``   see `model.head`                     shared state
``basis.…``            as the kind of private part says     shared state
``private.…``          as the kind of private part says     private state, never leaves
=====================  ===================================  ==========================

The private parts of all clients use the tensors ``basis.…``: for the kind ``taste`` the item
features of a user embedding (``basis.taste.…``), for ``hyper_lora`` also the factors of a LoRA
(``basis.hyper_lora.…``), and for ``shared_basis`` the factors A of clients with private factors B
(``basis.<module>.A``).

``<module>`` is the module's path in ``AutoModelForCausalLM``, such as
``model.layers.26.self_attn.q_proj``. All are float32 on the CPU between rounds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch

Tensors = Mapping[str, torch.Tensor]
_Value = TypeVar("_Value")

PRIVATE_PREFIX = "private."


class Group(StrEnum):
    """The groups of tensors; a name begins with that of its group and a dot."""

    LORA = "lora"
    HEAD = "head"
    BASIS = "basis"
    PRIVATE = "private"


def in_group(name: str, group: Group) -> bool:
    """Whether a tensor name belongs to a group."""
    return name.startswith(f"{group}.")


def of_group(named: Mapping[str, _Value], group: Group) -> dict[str, _Value]:
    """The entries of a mapping by tensor name that belong to one group."""
    return {name: value for name, value in named.items() if in_group(name, group)}


def lora_name(module: str, factor: str) -> str:
    """The name of factor ``A`` or ``B`` of a module's shared LoRA."""
    return f"{Group.LORA}.{module}.{factor}"


def lora_modules(names: Iterable[str]) -> list[str]:
    """The modules that have a shared LoRA among the given tensor names, in order."""
    factors = [name for name in names if in_group(name, Group.LORA) and name.endswith(".A")]
    return [name.removeprefix(f"{Group.LORA}.").removesuffix(".A") for name in factors]


def euclidean_norm(tensors: Tensors) -> float:
    """The Euclidean norm over all numbers of all tensors, in float64."""
    norms = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors.values())
    return math.hypot(*map(float, norms))


class Mode(StrEnum):
    """Which parts of the model score."""

    ZERO_SHOT = "zero_shot"
    SHARED_ONLY = "shared_only"
    PRIVATE_ONLY = "private_only"
    SHARED_PRIVATE = "shared_private"
    NONE = "none"
    """Not one of our models: a baseline."""


@dataclass(frozen=True)
class SharedState:
    """The tensors that the server aggregates and every client receives.

    Attributes:
        tensors: Name to float32 CPU tensor; names begin with ``lora.``, ``head.``, ``basis.``.
        round_number: The last round that it includes; 0 before the first.
    """

    tensors: Tensors
    round_number: int = 0


@dataclass(frozen=True)
class PrivateState:
    """The tensors that one client keeps. Only `private_store` writes them, on the client's side.

    Attributes:
        client_id: The client.
        version: The round after which it was written; 0 before the first.
        tensors: Name to float32 CPU tensor; names begin with ``private.``.
    """

    client_id: str
    version: int
    tensors: Tensors


class Refusal(StrEnum):
    """Why a client gave no update to a round; the keys of ``refused_by_reason`` in the record."""

    MALFORMED = "malformed"
    """A field or a tensor is of another type or shape than in the contract."""
    CONTRACT = "contract"
    """It was made under another contract, or names other tensors."""
    ROUND = "round"
    """It belongs to another round."""
    COHORT = "cohort"
    """The client was not asked in this round."""
    TWICE = "twice"
    """The client has sent an update of this round already."""
    NOT_FINITE = "not_finite"
    """A number is not finite."""
    TOO_LARGE = "too_large"
    """It is far larger than the updates before it; see `server.norm_bound`."""
    STAGE = "stage"
    """A stage of ``federation.stages`` refused it."""
    MASKED = "masked"
    """The masks of its round could not be taken off."""
    NO_ANSWER = "no_answer"
    """Nothing arrived."""


@dataclass(frozen=True)
class ClientUpdate:
    """The message of one client: its change of the shared state, and two numbers.

    Attributes:
        client_id: The sender.
        round_number: The round of the training, from 1.
        contract_hash: Hash of the update contract.
        num_examples: Number of next-item predictions in the training.
        loss: Mean training loss (nats) before the first step.
        delta: New minus received value of each shared tensor, float32 or as
            ``federation.transport`` says.
    """

    client_id: str
    round_number: int
    contract_hash: str
    num_examples: int
    loss: float
    delta: Tensors


@dataclass(frozen=True)
class NodeUpdate:
    """The message of a node: the weighted sum of its clients' changes, and three numbers.

    Attributes:
        node_id: The sender.
        round_number: The round of the training, from 1.
        contract_hash: Hash of the update contract.
        num_clients: How many clients are in the sum.
        num_examples: Their next-item predictions in the training.
        loss: Their weighted mean training loss (nats) before the first step.
        delta: The sum over clients of weight times new minus received value, of each shared tensor;
            `server.aggregation.update_weight` says the weight.
    """

    node_id: str
    round_number: int
    contract_hash: str
    num_clients: int
    num_examples: int
    loss: float
    delta: Tensors
