"""The private LoRA upon a basis that everybody learns, and how factors of a LoRA are drawn."""

import math
from functools import partial

import torch

from pfm_llm.base import seeding
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.protocol.parameters import Parameter, Sizes


def random_a(rank: int, fan_in: int, seed: int, purpose: str, client_id: str = "") -> torch.Tensor:
    """A factor A [rank, fan_in] before training, float32, as PEFT draws it.

    That is Kaiming-uniform with a = sqrt(5): uniform in ±1/sqrt(fan_in).

    Args:
        rank: Of the LoRA.
        fan_in: Inputs of the adapted layer.
        seed: The experiment's seed.
        purpose: Tells apart what is drawn.
        client_id: Whose; empty for what is shared.
    """
    generator = seeding.generator(seed, f"lora/{purpose}", client=client_id)
    return (torch.rand(rank, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def basis_parameters(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    """The factors A of the kind ``shared_basis``, of the adapted layers and of the head's term.

    Args:
        config: Private adapter, seed and the server's learning rates.
        sizes: Of the adapted layers and of the hidden states.
    """
    private, server, seed = config.adapters.private, config.federation.server, config.seed
    modules = sizes.modules if private.on_layers else {}
    shapes = {name: (private.rank, fan_in) for name, (fan_in, _) in modules.items()}
    if private.head_rank:
        shapes["head"] = (private.head_rank, sizes.hidden_size)
    rate = server.lr_lora * server.lr_scale
    return [
        Parameter(f"basis.{name}.A", shape, rate, partial(random_a, *shape, seed, f"basis/{name}"))
        for name, shape in shapes.items()
    ]
