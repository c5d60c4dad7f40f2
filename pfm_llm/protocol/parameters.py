"""The table of an experiment's shared tensors: everything that a server knows about the model.

The server's initial state, the contract of updates, the learning rate of each tensor and the size
of a message follow from the table. The table also says which rows belong to items, for the change
to another catalogue, and which shapes a published folder must have. Each part of the model declares
its tensors once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.protocol.contract import TensorSpec, UpdateContract, check_shared_name
from pfm_llm.protocol.transport import FLOAT32, dtype_of
from pfm_llm.protocol.types import SharedState


@dataclass(frozen=True)
class Sizes:
    """The sizes of a language model and a catalogue, which determine the shapes of tensors.

    Attributes:
        hidden_size: Width of the model's hidden states.
        modules: Path in the model to (in_features, out_features) of each adapted layer.
        num_items: Size of the catalogue.
        item_width: Numbers of an item's text vector before the whitening; None: the hidden size.
    """

    hidden_size: int
    modules: Mapping[str, tuple[int, int]]
    num_items: int
    item_width: int | None = None


class Unseen(Enum):
    """The initial row of an item that the catalogue of an adapter lacks."""

    ZERO = "zero"
    MEAN = "mean"


@dataclass(frozen=True)
class Parameter:
    """One shared tensor, float32.

    Attributes:
        name: The name, as in the table of `protocol.types`.
        shape: Its dimensions.
        rate: The server's learning rate for it, before the schedule.
        init: Makes the initial value; None: zeros.
        per_item: Whether its first dimension has a row for each item of the catalogue. Where items
            share vectors, the table has such a tensor with a row for each vector.
        unseen: With ``per_item``, the initial row of an item that is new to an adapter: zeros, or
            the mean row.
        per_code: Whether its first dimension has a row for each vector that items share; see
            `model.items.codes`.
        sent: Whether clients train and send it. A tensor that is not sent keeps its initial value.
    """

    name: str
    shape: tuple[int, ...]
    rate: float
    init: Callable[[], torch.Tensor] | None = field(default=None, compare=False)
    per_item: bool = False
    unseen: Unseen = Unseen.ZERO
    per_code: bool = False
    sent: bool = True

    def initial(self) -> torch.Tensor:
        """The tensor before training; the same bits at each call."""
        return torch.zeros(self.shape) if self.init is None else self.init()


class ParameterTable(Mapping[str, Parameter]):
    """The shared tensors of an experiment by name, in the order in which they were declared.

    Args:
        parameters: The tensors.
        transport: The dtype of the numbers of a message, without ``torch.``.

    Raises:
        ContractError: A name is private or of no known group, or two tensors have one name.
    """

    def __init__(self, parameters: Iterable[Parameter], transport: str = FLOAT32) -> None:
        self._sent_as = str(transport)
        self._parameters: dict[str, Parameter] = {}
        for parameter in parameters:
            check_shared_name(parameter.name, "a table of shared tensors")
            if parameter.name in self._parameters:
                raise ContractError(
                    f"two parts of the model declare a tensor {parameter.name}; rename one of them"
                )
            self._parameters[parameter.name] = parameter

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor, by name."""
        return {name: TensorSpec(parameter.shape) for name, parameter in self.items()}

    @property
    def sent(self) -> dict[str, TensorSpec]:
        """Shape and dtype of the tensors that are sent, as they are in a message, by name."""
        sent = {name: one for name, one in self.items() if one.sent}
        return {name: TensorSpec(one.shape, self._sent_as) for name, one in sent.items()}

    @property
    def per_item(self) -> tuple[str, ...]:
        """Names of the tensors with a row for each item."""
        return tuple(name for name, parameter in self.items() if parameter.per_item)

    @property
    def per_code(self) -> tuple[str, ...]:
        """Names of the tensors with a row for each vector that items share."""
        return tuple(name for name, parameter in self.items() if parameter.per_code)

    @property
    def num_bytes(self) -> int:
        """Size in bytes of the tensors that are sent, per client, round and direction."""
        return self._num_sent * dtype_of(self._sent_as).itemsize

    @property
    def held_bytes(self) -> int:
        """Size in bytes of the same tensors where they are computed with, in float32."""
        return self._num_sent * torch.float32.itemsize

    @property
    def _num_sent(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.sent.values())

    def initial_state(self) -> SharedState:
        """Every tensor before training, including tensors that are not sent."""
        return SharedState({name: parameter.initial() for name, parameter in self.items()})

    def contract(
        self, *, backbone_hash: str, prompt_hash: str, catalogue_hash: str
    ) -> UpdateContract:
        """The update contract for the tensors that are sent.

        Args:
            backbone_hash: Identity of the frozen backbone.
            prompt_hash: Identity of the prompt template.
            catalogue_hash: Identity of the catalogue.
        """
        return UpdateContract(self.sent, backbone_hash, prompt_hash, catalogue_hash)
