"""Tiny random models of several architectures, and windows and adapters to run them on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pfm_llm.config.choices import Task
from pfm_llm.config.model import AdaptersConfig, HeadConfig
from pfm_llm.data.history import History
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.cohort import CohortModel
from pfm_llm.model.head import ITEM_MET
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.objective import Objective
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import PrivatePart, make_private_part
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import Window
from tests.support.tables import Drawn, config_of, drawn

VOCABULARY = 97
HIDDEN = 32
NUM_LAYERS = 4
NUM_ITEMS = 11
SLIDING_WINDOW = 4
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(num_key_value_heads=2, **_COMMON),
    "qwen3": lambda: Qwen3Config(num_key_value_heads=2, head_dim=8, **_COMMON),
    # The last layer alone slides, so that a layer's kind depends on its index.
    "qwen2_sliding": lambda: Qwen2Config(
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=SLIDING_WINDOW,
        max_window_layers=NUM_LAYERS - 1,
        **_COMMON,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=SLIDING_WINDOW,
        layer_types=["full_attention", "sliding_attention"] * 2,
        **_COMMON,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON),
}
ARCHITECTURES = tuple(_CONFIGS)


def make_backbone(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Backbone:
    """A random model whose layers all matter; it has no tokenizer."""
    return random_backbone(_CONFIGS[architecture](), dtype)


def gpt2_backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    """A model with absolute positions, whose layers are no ``nn.Linear``."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=NUM_LAYERS, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return random_backbone(config, dtype)


def random_backbone(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Backbone:
    """A model with weights so large that attention and MLP change what comes in."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.25 if weight.dim() > 1 else weight + noise * 0.1)
    return Backbone(model.to(dtype), None, f"tiny-{config.model_type}", "0" * 64)


def random_window(item_lengths: Sequence[int], seed: int, header: int = 2) -> Window:
    """A window of random tokens whose items have these lengths, all but the last with a target."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(item_lengths)
    num_tokens = header + int(lengths.sum())
    items = torch.randint(NUM_ITEMS, (len(lengths) + 1,), generator=generator)[:-1].int().numpy()
    return Window(
        tokens=torch.randint(VOCABULARY, (num_tokens,), generator=generator).int().numpy(),
        item_ends=(header - 1 + lengths.cumsum(0)).int().numpy(),
        history=History(items, liked=items % 2 == 1),
        start=0,
        first_target=1,
    )


CLIENT_WINDOWS = (
    (random_window([3, 1, 4], 1),),
    (random_window([2, 2], 2), random_window([5, 1, 2, 3, 1], 3), random_window([1, 1], 4)),
    (random_window([2, 6, 1, 1], 5), random_window([4, 4], 6)),
)
"""Three clients with different numbers of windows of different lengths."""


@dataclass(frozen=True)
class TinyCohort:
    """A many-clients model, and what its parts are made of."""

    backbone: Backbone
    adapters: AdaptersConfig
    adapter: DualAdapter
    private: PrivatePart
    normaliser: Normaliser
    item_texts: torch.Tensor
    trunk: torch.nn.Module
    model: CohortModel
    head: HeadConfig

    def trunk_states(self, window: Window) -> torch.Tensor:
        """Trunk states [T, d] of one window, alone."""
        tokens = torch.from_numpy(window.tokens).long()[None]
        with torch.no_grad():
            states: torch.Tensor = self.trunk(input_ids=tokens, use_cache=False).last_hidden_state
        return states[0]

    def client_tensors(self, seed: int, noise: float = 0.2) -> dict[str, torch.Tensor]:
        """Shared, head and private tensors of one client, all away from zero."""
        tensors = {
            **shared_tensors(self.adapter, self.adapters, self.head),
            **self.private.initial(f"client-{seed}"),
        }
        return stirred(tensors, seed, noise)


def shared_tensors(
    adapter: DualAdapter, adapters: AdaptersConfig, head: HeadConfig | None = None, seed: int = 0
) -> Drawn:
    """The shared tensors of a tiny model before training."""
    sizes = Sizes(HIDDEN, adapter.modules, NUM_ITEMS)
    head = head or HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
    return drawn(parameter_table(config_of(head, adapters, seed=seed), sizes).values())


def stirred(tensors: Tensors, seed: int, noise: float = 0.2) -> dict[str, torch.Tensor]:
    """Tensors plus noise, so that nothing is zero; every item counts as met by somebody."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: value + noise * torch.randn(value.shape, generator=generator)
        for name, value in tensors.items()
    }
    return {name: v.abs() if name == ITEM_MET else v for name, v in found.items()}


def private_part(
    config: AdaptersConfig, adapter: DualAdapter, head: HeadConfig, seed: int = 0
) -> PrivatePart:
    """The private part of some settings, on a tiny model."""
    sizes = Sizes(HIDDEN, adapter.modules, NUM_ITEMS)
    return make_private_part(config_of(head, config, seed=seed), sizes)


def make_cohort(
    architecture: str = "llama",
    head: HeadConfig | None = None,
    dtype: torch.dtype = torch.float32,
    unseen_only: bool = False,
    **adapters: object,
) -> TinyCohort:
    """A tiny cohort model; the two adapters differ in rank and scale (4/3 and 5/2)."""
    backbone = make_backbone(architecture, dtype)
    config = AdaptersConfig.model_validate(
        {
            "num_layers": 2,
            "shared": {"rank": 3, "alpha": 4},
            "private": {"kind": "independent", "rank": 2, "alpha": 5, "head_rank": 2},
            **adapters,
        }
    )
    head = head or HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
    generator = torch.Generator().manual_seed(9)
    normaliser = Normaliser(
        torch.randn(HIDDEN, generator=generator) * 0.1,
        torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5,
    )
    item_texts = torch.randn(NUM_ITEMS, head.dim, generator=generator)
    adapter = DualAdapter(backbone, config)
    private = private_part(config, adapter, head)
    trunk, top = backbone.split(config.num_layers)
    model = CohortModel(
        top,
        adapter.top_paths(),
        adapter.scale(),
        normaliser,
        Objective(item_texts, (Task.NEXT_ITEM,), private, unseen_only),
    )
    return TinyCohort(
        backbone, config, adapter, private, normaliser, item_texts, trunk, model, head
    )


def stack(clients: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Tensors of several clients with a leading client dimension, ready for gradients."""
    return {
        name: torch.stack([tensors[name] for tensors in clients]).requires_grad_()
        for name in clients[0]
    }
