"""Private LoRA on the layers and on the head, trained by gradient steps.

::

    h_u = W x + s B_u A_u x

`IndependentLora` draws an A for every client and trains both factors. With `SharedBasisLora` all
clients train A together as the basis, and each client keeps only B.
"""

import functools
import math
from typing import ClassVar

import torch

from pfm_llm.base import seeding
from pfm_llm.model.private.part import Factors, PrivatePart
from pfm_llm.protocol.parameters import Parameter
from pfm_llm.protocol.types import Tensors

HEAD = "head"


class IndependentLora(PrivatePart):
    """A private LoRA whose factors A and B both belong to the client."""

    takes_steps: ClassVar[bool] = True
    acts_on_states: ClassVar[bool] = True
    _own_a: ClassVar[bool] = True

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """A is drawn for the client, B is zero."""
        tensors = {}
        for module, rank, fan_in, fan_out in self._terms():
            key = _own(module)
            if self._own_a:
                tensors[f"{key}.A"] = random_a(rank, fan_in, self.config.seed, key, client_id)
            tensors[f"{key}.B"] = torch.zeros(fan_out, rank)
        return tensors

    def factors(self, module: str, stacked: Tensors, weight: float) -> Factors | None:
        """See `PrivatePart.factors`."""
        scale = self.settings.scale
        return self._factors(module, stacked, scale * weight)

    def head_factors(self, stacked: Tensors, weight: float) -> Factors | None:
        """See `PrivatePart.head_factors`; the term on the head has the scale 1."""
        return self._factors(HEAD, stacked, weight)

    def deciding(self, stacked: Tensors) -> Tensors:
        """The factors B: where B is zero, A changes no score."""
        return {name: value for name, value in stacked.items() if name.endswith(".B")}

    def _factors(self, module: str, stacked: Tensors, scale: float) -> Factors | None:
        b = stacked.get(f"{_own(module)}.B")
        return None if b is None else (self._a(module, stacked), b * scale)

    def _a(self, module: str, stacked: Tensors) -> torch.Tensor:
        return stacked[f"{_own(module)}.A"]

    def _terms(self) -> list[tuple[str, int, int, int]]:
        """Each low-rank term: module, rank, in and out features; the head's comes last."""
        settings, sizes = self.settings, self.sizes
        modules = sizes.modules if settings.on_layers else {}
        terms = [(module, settings.rank, *shape) for module, shape in modules.items()]
        if settings.head_rank:
            terms.append((HEAD, settings.head_rank, sizes.hidden_size, self.config.head.dim))
        return terms


class SharedBasisLora(IndependentLora):
    """A private LoRA whose B belongs to the client; all clients train A, the basis (FedSA-LoRA)."""

    _own_a: ClassVar[bool] = False

    def shared_parameters(self) -> list[Parameter]:
        """The bases, drawn like any A."""
        server, seed = self.config.federation.server, self.config.seed
        rate = server.lr_lora * server.lr_scale
        return [
            Parameter(
                f"basis.{module}.A",
                (rank, fan_in),
                rate,
                functools.partial(random_a, rank, fan_in, seed, f"basis/{module}"),
            )
            for module, rank, fan_in, _ in self._terms()
        ]

    def _a(self, module: str, stacked: Tensors) -> torch.Tensor:
        return stacked[f"basis.{module}.A"]


def random_a(rank: int, fan_in: int, seed: int, purpose: str, client_id: str = "") -> torch.Tensor:
    """A factor A [rank, fan_in] before training, float32, as PEFT draws it.

    That is Kaiming-uniform with a = sqrt(5): uniform in ±1/sqrt(fan_in).

    Args:
        rank: Rank of the LoRA.
        fan_in: Input features of the adapted layer.
        seed: The experiment's seed.
        purpose: Name of the random draw.
        client_id: The client; empty for a shared factor.
    """
    generator = seeding.generator(seed, f"lora/{purpose}", client=client_id)
    return (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def _own(module: str) -> str:
    return "private.head" if module == HEAD else f"private.lora.{module}"
