"""Private LoRA on the layers and on the head, trained by gradient steps.

::

    h_u = W x + s B_u A_u x

`IndependentLora` draws an A for every client and trains both factors; with `SharedBasisLora` all
clients train A together, as the basis, and keep B alone.
"""

import math
from typing import ClassVar

import torch

from pfm_llm.base import seeding
from pfm_llm.model.private.part import Factors, PrivatePart
from pfm_llm.protocol.types import Tensors

HEAD = "head"


class IndependentLora(PrivatePart):
    """A and B are the client's own."""

    takes_steps: ClassVar[bool] = True
    acts_on_states: ClassVar[bool] = True
    _own_a: ClassVar[bool] = True

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """A is drawn for the client, B is zero."""
        settings, tensors = self.context.settings, {}
        for module, rank, fan_in, fan_out in self._terms():
            key = _own(module)
            if self._own_a:
                tensors[f"{key}.A"] = random_a(rank, fan_in, self.context.seed, key, client_id)
            tensors[f"{key}.B"] = torch.zeros(fan_out, rank)
        assert tensors, f"{settings.kind} with nothing to train"
        return tensors

    def factors(self, module: str, stacked: Tensors, weight: float) -> Factors | None:
        """See `PrivatePart.factors`."""
        settings = self.context.settings
        return self._factors(module, stacked, settings.alpha / settings.rank * weight)

    def head_factors(self, stacked: Tensors, weight: float) -> Factors | None:
        """See `PrivatePart.head_factors`; the term on the head has the scale 1."""
        return self._factors(HEAD, stacked, weight)

    def deciding(self, stacked: Tensors) -> Tensors:
        """B: with B at zero A changes nothing."""
        return {name: value for name, value in stacked.items() if name.endswith(".B")}

    def _factors(self, module: str, stacked: Tensors, scale: float) -> Factors | None:
        b = stacked.get(f"{_own(module)}.B")
        return None if b is None else (self._a(module, stacked), b * scale)

    def _a(self, module: str, stacked: Tensors) -> torch.Tensor:
        return stacked[f"{_own(module)}.A"]

    def _terms(self) -> list[tuple[str, int, int, int]]:
        """Each low-rank term: module, rank, in and out features; the head's comes last."""
        settings, sizes = self.context.settings, self.context.sizes
        modules = sizes.modules if settings.on_layers else {}
        terms = [(module, settings.rank, *shape) for module, shape in modules.items()]
        if settings.head_rank:
            terms.append((HEAD, settings.head_rank, sizes.hidden_size, self.context.head.dim))
        return terms


class SharedBasisLora(IndependentLora):
    """B is the client's own, A is the basis that all clients train (FedSA-LoRA)."""

    _own_a: ClassVar[bool] = False

    def initial_shared(self) -> dict[str, torch.Tensor]:
        """The bases, drawn like any A."""
        return {
            f"basis.{module}.A": random_a(rank, fan_in, self.context.seed, f"basis/{module}")
            for module, rank, fan_in, _ in self._terms()
        }

    def _a(self, module: str, stacked: Tensors) -> torch.Tensor:
        return stacked[f"basis.{module}.A"]


def random_a(rank: int, fan_in: int, seed: int, purpose: str, client_id: str = "") -> torch.Tensor:
    """A factor A [rank, fan_in] as PEFT draws it: uniform in ±1/sqrt(fan_in), float32.

    That is Kaiming-uniform with a = sqrt(5).
    """
    generator = seeding.generator(seed, f"lora/{purpose}", client=client_id)
    return (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def _own(module: str) -> str:
    return "private.head" if module == HEAD else f"private.lora.{module}"
