"""The numbers of a message: what is sent may be shorter than what is computed with.

With ``federation.transport: bfloat16`` a message has half the bytes. The server rounds the shared
state that it broadcasts, and a client rounds its update; the server's own state stays in float32,
so that steps smaller than the rounding add up over rounds. A number keeps 8 significant bits, which
is little beside what the updates of two clients differ by.
"""

from collections.abc import Mapping

import torch

from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.types import SharedState, Tensors

FLOAT32 = "float32"


def dtype_of(name: str) -> torch.dtype:
    """A torch dtype by its name, without ``torch.``."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def as_sent(tensors: Tensors, specs: Mapping[str, TensorSpec]) -> Tensors:
    """The tensors of a contract, in the types in which it wants them sent.

    Args:
        tensors: Those of the contract, and perhaps others.
        specs: The contract's.
    """
    return {name: tensors[name].to(dtype_of(spec.dtype)) for name, spec in specs.items()}


def as_received(tensors: Tensors) -> Tensors:
    """Tensors that arrived, in float32; the same ones where they are."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def broadcast(shared: SharedState, specs: Mapping[str, TensorSpec]) -> SharedState:
    """A shared state of the server as clients receive it, float32.

    Args:
        shared: The server's.
        specs: The contract's. Tensors that are not sent are known to all from the start.
    """
    received = {**shared.tensors, **as_received(as_sent(shared.tensors, specs))}
    return SharedState(received, shared.round_number)
