"""The contract of updates: an allow-list of tensors, checked when sending and when receiving.

The two adapters of a client have identical keys in PEFT, so nobody would notice that the wrong one
was sent. Therefore `UpdateContract.build` makes every update from exactly the named tensors, and
the server runs `UpdateContract.check` before it uses any number.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.protocol.types import (
    PRIVATE_PREFIX,
    ClientUpdate,
    Group,
    NodeUpdate,
    Refusal,
    Tensors,
    in_group,
)

_SHARED_GROUPS = (Group.LORA, Group.HEAD, Group.BASIS)
MAX_EXAMPLES = 2**31 - 1
"""An update that claims more is refused: its weight would outweigh all other clients."""
MAX_LOSS = 1e6
"""An update with a larger loss (nats) is refused: it would hide the loss of all other clients."""

_SHOWN_NAMES = 3
_SHOWN_LENGTH = 80


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor.

    Attributes:
        shape: Its dimensions.
        dtype: Name of the torch dtype, without ``torch.``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        """Such as ``float32[8, 576]``."""
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class UpdateContract:
    """The allow-list of an experiment's updates.

    Attributes:
        tensors: Name to spec of every tensor that is sent; nothing else may be sent.
        backbone_hash: Identity of the frozen backbone.
        prompt_hash: Identity of the prompt template.
        catalogue_hash: Identity of the catalogue, on which the order of item rows depends.

    Raises:
        ContractError: A name is private or of no known group, or a hash is empty.
    """

    tensors: dict[str, TensorSpec]
    backbone_hash: str
    prompt_hash: str
    catalogue_hash: str

    def __post_init__(self) -> None:
        for name in self.tensors:
            check_shared_name(name, "a contract")
        for field in ("backbone_hash", "prompt_hash", "catalogue_hash"):
            if not getattr(self, field):
                raise ContractError(f"the contract's {field} is empty; give the hash")
        object.__setattr__(self, "tensors", dict(self.tensors))

    def hash(self) -> str:
        """SHA-256, in hex, over names, shapes, dtypes and the three identities."""
        specs = {name: [list(spec.shape), spec.dtype] for name, spec in self.tensors.items()}
        identities = [self.backbone_hash, self.prompt_hash, self.catalogue_hash]
        text = json.dumps([specs, identities], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def build(
        self, client_id: str, round_number: int, num_examples: int, loss: float, delta: Tensors
    ) -> ClientUpdate:
        """Make the only message that leaves a client.

        Values are checked only on arrival. A client whose training diverged is then refused and
        counted, and does not stop the round.

        Args:
            client_id: The sender.
            round_number: The round of the training, from 1.
            num_examples: Number of predictions in the training.
            loss: Mean training loss (nats) before the first step.
            delta: Exactly the tensors of the contract, in its dtypes; see `transport.as_sent`. They
                are cloned to the CPU, so that the message shares no storage with the tensors of
                other clients or with private parts.

        Raises:
            ContractError: ``delta`` lacks a tensor, has another one, or one of another shape or
                dtype.
        """
        self._check_names(client_id, delta)
        for name, spec in self.tensors.items():
            _check_spec(client_id, name, delta[name], spec)
        return ClientUpdate(
            client_id=client_id,
            round_number=round_number,
            contract_hash=self.hash(),
            num_examples=num_examples,
            loss=loss,
            delta={name: _own_copy(delta[name]) for name in self.tensors},
        )

    def check(self, update: ClientUpdate, round_number: int) -> None:
        """Check an update on arrival.

        Args:
            update: The update, which may be malformed in any way.
            round_number: The current round.

        Raises:
            ContractError: The update belongs to another contract or round, its tensor names
                differ from the contract, or a tensor or number is invalid. The message names the
                client, the tensor or number, and the reason.
        """
        if type(update) is not ClientUpdate:
            raise ContractError(
                f"a {type(update).__name__} arrived in place of an update", Refusal.MALFORMED
            )
        client = update.client_id
        _check_field(client, "client_id", client, str)
        self._check_origin(client, update, round_number)
        _check_numbers(client, update.num_examples, update.loss)
        self._check_tensors(client, update.delta)

    def check_sum(self, update: NodeUpdate, round_number: int, num_asked: int) -> None:
        """Check the sum of a node on arrival.

        Args:
            update: The sum, which may be malformed in any way.
            round_number: The current round.
            num_asked: How many clients of the node were asked.

        Raises:
            ContractError: As in `check`, or the sum is over more clients than were asked.
        """
        if type(update) is not NodeUpdate:
            raise ContractError(
                f"a {type(update).__name__} arrived in place of a sum", Refusal.MALFORMED
            )
        node = update.node_id
        _check_field(node, "node_id", node, str)
        self._check_origin(node, update, round_number)
        _check_numbers(node, update.num_examples, update.loss)
        _check_field(node, "num_clients", update.num_clients, int)
        if not 0 < update.num_clients <= num_asked:
            raise _malformed(
                node, f"a sum over {_show(update.num_clients)} clients, {num_asked} were asked"
            )
        self._check_tensors(node, update.delta)

    def _check_origin(
        self, client: str, update: ClientUpdate | NodeUpdate, round_number: int
    ) -> None:
        _check_field(client, "round_number", update.round_number, int)
        _check_field(client, "contract_hash", update.contract_hash, str)
        if update.contract_hash != self.hash():
            raise ContractError(
                f"client {_show(client)}: built under contract {_show(update.contract_hash)}, not "
                f"{self.hash()!r}; its backbone, prompt, catalogue, codes of items or adapter "
                "shapes differ; give it the config and the start of this federation"
            )
        if update.round_number != round_number:
            raise ContractError(
                f"client {_show(client)}: trained in round {_show(update.round_number)}, "
                f"but round {round_number} is under way",
                Refusal.ROUND,
            )

    def _check_tensors(self, client: str, delta: Any) -> None:
        self._check_names(client, delta)
        for name, spec in self.tensors.items():
            tensor = delta[name]
            try:
                _check_spec(client, name, tensor, spec)
                _check_plain(client, name, tensor)
                is_finite = bool(torch.isfinite(tensor).all())
            except RuntimeError as error:  # of a tensor from inside torch.func.vmap
                raise _malformed(client, f"{name} is a tensor that cannot be read") from error
            if not is_finite:
                raise ContractError(
                    f"client {_show(client)}: {name} holds values that are not finite; "
                    "its training diverged (lower federation.local.shared_lr)",
                    Refusal.NOT_FINITE,
                )

    def _check_names(self, client_id: str, delta: Any) -> None:
        if not isinstance(delta, Mapping):
            raise ContractError(
                f"client {_show(client_id)}: the update holds no named tensors", Refusal.MALFORMED
            )
        private = [n for n in delta if isinstance(n, str) and n.startswith(PRIVATE_PREFIX)]
        if private:
            raise ContractError(
                f"client {_show(client_id)}: private tensors never leave their client, "
                f"but the update holds {_show_names(private)}"
            )
        missing = self.tensors.keys() - delta.keys()
        extra = delta.keys() - self.tensors.keys()
        if missing or extra:
            problems = [f"lacks {_show_names(missing)}"] if missing else []
            problems += [f"has {_show_names(extra)}, not in the contract"] if extra else []
            raise ContractError(f"client {_show(client_id)}: the update {' and '.join(problems)}")


def check_shared_name(name: str, where: str) -> None:
    """Refuse a name that does not belong to a shared tensor.

    Args:
        name: Name of a tensor.
        where: The place of the tensor, for messages.

    Raises:
        ContractError: The name is private or belongs to no known group.
    """
    if name.startswith(PRIVATE_PREFIX):
        raise ContractError(f"{_show(name)} is private and can never be in {where}")
    if not any(in_group(name, group) for group in _SHARED_GROUPS):
        raise ContractError(
            f"{_show(name)} cannot be in {where}: shared tensors begin with "
            f"{', '.join(f'{group}.' for group in _SHARED_GROUPS)}"
        )


def _check_spec(client_id: str, name: str, tensor: Any, spec: TensorSpec) -> None:
    # A subclass may answer anything; other layouts have no shape, or no values that can be read.
    dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not dense or tensor.is_nested or tensor.is_meta:
        raise _malformed(client_id, f"{name} is not a dense tensor with values")
    found = TensorSpec.of(tensor)
    if found != spec:
        raise _malformed(client_id, f"{name} is {found}, must be {spec}")


def _check_plain(client_id: str, name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that `UpdateContract.build` cannot have made, though its shape is right."""
    problem = None
    if tensor.device.type != "cpu":
        problem = f"is on {tensor.device.type}"
    elif tensor.requires_grad:
        problem = "carries a graph of gradients"
    elif not tensor.is_contiguous() or tensor.is_neg():
        problem = "is a view with another layout of memory"
    elif tensor.untyped_storage().nbytes() < _end_of(tensor):
        problem = "is larger than its memory"
    if problem is not None:
        raise _malformed(client_id, f"{name} {problem}; send a plain contiguous tensor on the CPU")


def _end_of(tensor: torch.Tensor) -> int:
    """The byte of its storage at which a contiguous tensor ends."""
    return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()


def _check_field(client_id: Any, name: str, value: Any, kind: type) -> None:
    if type(value) is not kind:
        raise _malformed(client_id, f"{name} is {_show(value)}, must be of type {kind.__name__}")


def _check_numbers(client_id: str, num_examples: Any, loss: Any) -> None:
    if type(num_examples) is not int or not 0 < num_examples <= MAX_EXAMPLES:
        raise _malformed(
            client_id,
            f"num_examples is {_show(num_examples)}, must be an integer from 1 to {MAX_EXAMPLES}",
        )
    if type(loss) is not float or not math.isfinite(loss):
        problem = f"loss is {_show(loss)}, must be a finite float"
        kind = Refusal.NOT_FINITE if type(loss) is float else Refusal.MALFORMED
        raise ContractError(f"client {_show(client_id)}: {problem}", kind)
    if abs(loss) > MAX_LOSS:
        problem = f"loss is {loss:g}, must be within ±{MAX_LOSS:g}"
        raise ContractError(f"client {_show(client_id)}: {problem}", Refusal.TOO_LARGE)


def _malformed(client_id: Any, problem: str) -> ContractError:
    return ContractError(f"client {_show(client_id)}: {problem}", Refusal.MALFORMED)


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    # A view would be pickled with its whole storage, other clients' slices included.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _show(value: Any) -> str:
    try:  # from an untrusted client: escaped, and cut to keep the log short
        text = repr(value)
    except Exception:  # such as an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "…"


def _show_names(names: Iterable[Any]) -> str:
    ordered = sorted(map(_show, names))
    shown = ", ".join(ordered[:_SHOWN_NAMES])
    more = len(ordered) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def specs_of(tensors: Tensors) -> dict[str, TensorSpec]:
    """Name to shape and dtype of each tensor."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def first_difference(
    found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> str | None:
    """The first name, in order, with another shape or dtype than expected; None: there is none."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name} is {found.get(name, 'absent')}, must be {expected.get(name, 'absent')}"
    return None
