"""Builds the backbone, adapter, head and encoder of a config, for training and for serving.

A new model fits its whitening on the catalogue and draws its shared state. A model that starts from
a published adapter takes both from the adapter: the whitening is never refitted, and the rows of
items follow their items by key.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from pfm_llm.base import assets, files
from pfm_llm.base.errors import CorruptFileError, DataError, StorageError
from pfm_llm.base.progress import Progress
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.backbone import Backbone, load_backbone
from pfm_llm.model.cohort import CohortModel
from pfm_llm.model.head import Normaliser, fit_normaliser
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.objective import Objective
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import PrivatePart, make_private_part
from pfm_llm.model.start import Start
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.parameters import ParameterTable, Sizes
from pfm_llm.protocol.types import SharedState
from pfm_llm.text.encoding import HistoryEncoder
from pfm_llm.text.prompts import Prompt, load_prompt
from pfm_llm.text.token_table import FORMAT_VERSION

_log = logging.getLogger(__name__)
_ITEM_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ModelParts:
    """The connected objects of a model over a catalogue.

    Attributes:
        backbone: The frozen model.
        trunk: Its layers below the adapted ones.
        prompt: The template.
        encoder: Renders histories.
        adapter: The adapted layers, and shared and private LoRA in the format of PEFT.
        normaliser: The whitening of the catalogue, or of the adapter that the model starts from.
        model: The many-clients model.
        table: The shared tensors.
        shared: The shared state that it starts with.
        contract: The tensors that an update may hold.
    """

    backbone: Backbone
    trunk: nn.Module
    prompt: Prompt
    encoder: HistoryEncoder
    adapter: DualAdapter
    normaliser: Normaliser
    model: CohortModel
    table: ParameterTable
    shared: SharedState
    contract: UpdateContract

    @property
    def private(self) -> PrivatePart:
        """The kind of private part."""
        return self.model.objective.private


def build_model(
    config: ExperimentConfig,
    catalogue: Catalogue,
    ratings: np.ndarray | None,
    device: torch.device,
    start: Start | None = None,
) -> ModelParts:
    """Build a model and connect its parts.

    Args:
        config: Prompt, backbone, window, adapters and head.
        catalogue: The items.
        ratings: Every rating that a history may show; None when the data has no ratings.
        device: The device to compute on.
        start: A published adapter to continue from.

    Raises:
        DataError: The prompt needs a field that the data lacks, or a window exceeds the context.
        BackboneError: The model cannot be loaded or adapted.
        ArtefactError: The adapter belongs to another base, or its shapes differ from the config.
    """
    prompt = _load_prompt(config.prompt, ratings)
    backbone = _load_backbone(config, device, start)
    values = () if ratings is None else tuple(np.unique(ratings).tolist())
    encoder = HistoryEncoder(
        prompt, catalogue, backbone.tokenizer, config.window, backbone.max_tokens, values
    )
    adapter = DualAdapter(backbone, config.adapters)
    trunk, top = backbone.split(config.adapters.num_layers)
    sizes = Sizes(backbone.hidden_size, adapter.modules, len(catalogue))
    private, table = make_private_part(config, sizes), parameter_table(config, sizes)
    shared = start.shared(table, prompt) if start else table.initial_state()
    states = item_states(backbone, encoder, prompt, catalogue.content_hash())
    normaliser = start.normaliser if start else fit_normaliser(states)
    texts = normaliser(states)[:, : config.head.dim].contiguous()
    objective = Objective(texts, config.tasks, private, config.federation.local.unseen_only)
    return ModelParts(
        backbone=backbone,
        trunk=trunk,
        prompt=prompt,
        encoder=encoder,
        adapter=adapter,
        normaliser=normaliser,
        model=CohortModel(top, adapter.top_paths(), adapter.scale(), normaliser, objective),
        table=table,
        shared=shared,
        contract=table.contract(
            backbone_hash=backbone.weights_hash,
            prompt_hash=prompt.content_hash(),
            catalogue_hash=catalogue.content_hash(),
        ),
    )


def _load_backbone(config: ExperimentConfig, device: torch.device, start: Start | None) -> Backbone:
    """The backbone; that of another base than the start's is refused, if possible unloaded."""
    if start is None:
        return load_backbone(config.backbone, device)
    allow = bool(config.init_from and config.init_from.allow_base_mismatch)
    check = None if allow else partial(start.check_weights, config.backbone.name)
    backbone = load_backbone(config.backbone, device, check)
    start.check_base(backbone, allow)
    return backbone


def _load_prompt(name: str, ratings: np.ndarray | None) -> Prompt:
    prompt = load_prompt(name)
    if prompt.uses_rating and ratings is None:
        raise DataError(
            f"prompt {prompt.key} shows ratings and the data has none; set data.columns.rating, "
            "or choose a prompt without ratings such as next_item.v1"
        )
    return prompt


def item_states(
    backbone: Backbone, encoder: HistoryEncoder, prompt: Prompt, catalogue_hash: str
) -> torch.Tensor:
    """Frozen states of the catalogue's texts, float32 [I, d], cached between runs.

    The states depend on the catalogue and not on any user. The public cache therefore keeps them,
    under a hash of everything that they depend on.
    """
    parts = (
        backbone.weights_hash,
        str(backbone.dtype),
        backbone.device.type,
        prompt.content_hash(),
        str(encoder.config.max_item_tokens),
        catalogue_hash,
        str(FORMAT_VERSION),
    )
    key = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]
    path = assets.cache_dir() / "items" / f"{key}.safetensors"
    try:
        tensors, header = files.read_tensors(path)
        if header["sha256"] != _sha256(tensors["states"]):
            raise CorruptFileError(f"{path} does not match its checksum")
        return tensors["states"].clone()
    except FileNotFoundError:
        pass
    except (StorageError, KeyError) as error:
        _log.warning("item states: %s; computing them again", error)
    pieces = encoder.catalogue_pieces()
    with Progress(sum(map(len, pieces)), "reading the items' texts", unit="tokens") as progress:
        states = backbone.last_token_states(pieces, _ITEM_BATCH_TOKENS, progress)
    try:
        files.write_tensors(path, {"states": states}, {"sha256": _sha256(states)})
    except StorageError as error:
        # A run works without the cache: it then computes the states each time.
        _log.warning("item states: %s; going on without keeping them", error)
    return states


def _sha256(states: torch.Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()
