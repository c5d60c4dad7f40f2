"""The names of the server's state in a checkpoint."""

import torch

from pfm_llm.protocol.types import Tensors

PREFIXES = ("shared/", "first/", "second/")
"""Of the shared tensors and of the optimizer's two moments."""


def shared_tensors(state: Tensors) -> dict[str, torch.Tensor]:
    """The shared tensors in a checkpoint's tensors, those of `Server.state_tensors`."""
    return behind(PREFIXES[0], state)


def behind(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
