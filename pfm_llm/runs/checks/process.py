"""The shape of a run, from which its memory is estimated, and the memory of this process."""

import math
import resource
import sys

import numpy as np
import psutil
import torch

from pfm_llm.client.histories import most_windows
from pfm_llm.config.choices import Reading
from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known
from pfm_llm.data.partition import partition
from pfm_llm.model.backbone import resolve_dtype, unloaded_backbone
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.runs.checks.memory import TOKENS_OF_TITLE, Shape
from pfm_llm.runs.run import Corpus


def shape_of(config: ExperimentConfig, data: Corpus) -> Shape:
    """The shape of a run. The language model is not loaded; of it, the settings are read.

    Args:
        config: A settled config.
        data: Its data.

    Raises:
        BackboneError, AssetError: See `load_backbone`.
    """
    backbone = unloaded_backbone(config.backbone)
    modules = DualAdapter(backbone, config.adapters).modules
    train, num_items = data.split.train.interactions, len(data.interactions.catalogue)
    sizes = Sizes(backbone.hidden_size, modules, num_items)
    table = parameter_table(config, sizes)
    lengths = np.diff(train.offsets)
    clients = partition(data.interactions, config.data.users_per_client, config.seed)
    of_clients = np.array([lengths[list(client.users)].sum() for client in clients])
    in_a_step = np.minimum(of_clients, _events_per_step(config))
    text = backbone.model.config.get_text_config()
    return Shape(
        before=held_memory(),
        num_weights=sum(weight.numel() for weight in backbone.model.parameters()),
        stored=backbone.dtype.itemsize,
        computed=resolve_dtype(config.backbone.dtype, torch.device("cpu")).itemsize,
        hidden=backbone.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * backbone.hidden_size,
        num_top=config.adapters.num_layers + _runs_again(config),
        table=table.held_bytes,
        of_codes=sum(math.prod(table[name].shape[1:]) for name in table.per_code),
        num_items=num_items,
        num_users=int((lengths > 0).sum()),
        users_per_client=config.data.users_per_client,
        num_events=int(lengths.sum()),
        longest=int(in_a_step.max()),
        usual=int(np.quantile(in_a_step, 0.9)),
        cohort=known(config.federation.cohort_size),
        chunk_tokens=config.runtime.tokens_per_chunk,
        window_items=config.window.items,
        tokens_per_item=1 if config.window.reading is Reading.ITEMS else TOKENS_OF_TITLE,
        baselines=config.evaluation.baselines,
    )


def _events_per_step(config: ExperimentConfig) -> int:
    """The most events of one client in one step."""
    local, window = config.federation.local, config.window
    windows = local.windows_per_step or most_windows(config.data.users_per_client)
    if window.max_windows is not None:
        windows = min(windows, window.max_windows * config.data.users_per_client)
    return windows * window.items


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes


def held_memory() -> int:
    """Bytes that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes that a process on this machine can still get without swapping."""
    return int(psutil.virtual_memory().available)


def _runs_again(config: ExperimentConfig) -> int:
    private = config.adapters.private
    return PRIVATE_KINDS[private.kind].runs_again if private.enabled else 0
