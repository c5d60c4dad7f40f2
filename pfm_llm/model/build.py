"""Builds the backbone, adapter, head and encoder of a config, for training and for serving.

A new model fits its whitening on the catalogue and draws its shared state. A model that starts from
a published adapter takes both from the adapter: the whitening is never refitted, and the rows of
items follow their items by key. A node takes whitening and codes from its server.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import Ablation, Reading
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.ablation import has_pass, sight_of, texts_of
from pfm_llm.model.backbone import Backbone, load_backbone, with_random_weights
from pfm_llm.model.cohort import CohortModel
from pfm_llm.model.items.codes import ItemCodes, make_codes
from pfm_llm.model.items.fitted import FittedTexts
from pfm_llm.model.items.reader import Trunk, read_items
from pfm_llm.model.items.vectors import ItemStates, item_states
from pfm_llm.model.items.whitening import Normaliser, fit_normaliser
from pfm_llm.model.lora import DualAdapter
from pfm_llm.model.objective import Objective
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import PrivatePart, make_private_part
from pfm_llm.model.start import Start
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.parameters import ParameterTable, Sizes
from pfm_llm.protocol.types import SharedState, Tensors
from pfm_llm.text.encoding import HistoryEncoder
from pfm_llm.text.item_keys import item_keys
from pfm_llm.text.prompts import Prompt, load_prompt


@dataclass(frozen=True)
class ModelParts:
    """The connected objects of a model over a catalogue.

    Attributes:
        backbone: The frozen model.
        trunk: What turns windows into trunk states.
        prompt: The template.
        encoder: Renders histories.
        adapter: The adapted layers, and shared and private LoRA in the format of PEFT.
        normaliser: The whitening of user states: that of the catalogue's texts as a history shows
            them, or of the adapter that the model starts from.
        item_normaliser: The whitening of item vectors, from the same source; the same object where
            items and user states share a space.
        item_encoder_hash: Identity of the encoder of items; None: the backbone.
        model: The many-clients model.
        table: The shared tensors.
        shared: The shared state that it starts with.
        contract: The tensors that an update may hold.
    """

    backbone: Backbone
    trunk: Trunk
    prompt: Prompt
    encoder: HistoryEncoder
    adapter: DualAdapter
    normaliser: Normaliser
    item_normaliser: Normaliser
    item_encoder_hash: str | None
    model: CohortModel
    table: ParameterTable
    shared: SharedState
    contract: UpdateContract

    @property
    def codes(self) -> ItemCodes | None:
        """The vectors that items share; None: each item has rows of its own."""
        return self.model.objective.codes

    @property
    def fitted(self) -> FittedTexts:
        """What was fitted to the catalogue's texts."""
        return FittedTexts.of(self.normaliser, self.item_normaliser, self.codes)

    @property
    def private(self) -> PrivatePart:
        """The kind of private part."""
        return self.model.objective.private

    def export_private(self, own: Tensors, weight: float, folder: Path) -> None:
        """Write one client's private LoRA as a PEFT folder; see `DualAdapter.export_private`.

        Args:
            own: The client's shared and private tensors.
            weight: Factor on the private part.
            folder: The folder to write.

        Raises:
            ConfigError: See `DualAdapter.export_private`.
        """
        (rows,) = self.model.slices({name: value[None] for name, value in own.items()}, 1)
        output = self.private.output_lora(rows, self.model.item_texts, weight)
        lora = self.private.own_lora(own, weight)
        self.adapter.export_private(lora, folder, self.backbone.portable_name, output)


def build_model(
    config: ExperimentConfig,
    catalogue: Catalogue,
    ratings: np.ndarray | None,
    device: torch.device,
    start: Start | None = None,
    fitted: FittedTexts | None = None,
) -> ModelParts:
    """Build a model and connect its parts.

    Args:
        config: Prompt, backbone, window, adapters and head.
        catalogue: The items.
        ratings: Every rating that a history may show; None when the data has no ratings.
        device: The device to compute on.
        start: A published adapter to continue from.
        fitted: Whitening and codes that another machine has fitted to the same texts; None: those
            of ``start``, or fitted now.

    Raises:
        DataError: The prompt needs a field that the data lacks, or a window exceeds the context.
        BackboneError: The model cannot be loaded or adapted.
        ArtefactError: The adapter belongs to another base, or its shapes or codes differ from the
            config; or what was fitted is of other texts.
    """
    prompt = _load_prompt(config.prompt, ratings)
    backbone = _load_backbone(config, device, start)
    values = () if ratings is None else tuple(np.unique(ratings).tolist())
    read, reader = texts_of(config, catalogue), (backbone.tokenizer, config.window)
    encoder = HistoryEncoder(prompt, read, *reader, backbone.max_tokens, values)
    adapter = DualAdapter(backbone, config.adapters)
    trunk, top = backbone.split(config.adapters.num_layers)
    states = item_states(config.items, backbone, encoder)
    if start is not None:
        start.check_item_encoder(states, config.items.encoder)
    sizes = Sizes(backbone.hidden_size, adapter.modules, *states.items.shape)
    private, table = make_private_part(config, sizes), parameter_table(config, sizes)
    shared = start.shared(table, prompt) if start else table.initial_state()
    normaliser, item_normaliser = _whitenings(states, fitted or start)
    texts = item_normaliser(states.items)[:, : config.head.dim].contiguous()
    codes = _codes(config, partial(item_keys, catalogue, prompt), texts, table, fitted or start)
    local, layers = config.federation.local, (adapter.top_paths(), adapter.scale())
    objective = Objective(texts, config.tasks, private, local.unseen_only, codes)
    return ModelParts(
        backbone=backbone,
        trunk=_trunk(config, trunk, backbone, encoder),
        prompt=prompt,
        encoder=encoder,
        adapter=adapter,
        normaliser=normaliser,
        item_normaliser=item_normaliser,
        item_encoder_hash=states.encoder_hash,
        model=CohortModel(top, *layers, normaliser, objective, sight_of(config, encoder)),
        table=table,
        shared=shared,
        contract=table.contract(**_identities(backbone, prompt, catalogue, codes)),
    )


def _trunk(
    config: ExperimentConfig, layers: nn.Module, backbone: Backbone, encoder: HistoryEncoder
) -> Trunk:
    """What turns windows into trunk states."""
    if not has_pass(config):
        return None
    if config.window.reading is Reading.ITEMS:
        return read_items(layers, config.adapters.num_layers, backbone, encoder)
    return layers


def _codes(
    config: ExperimentConfig,
    keys: Callable[[], Sequence[str]],
    texts: torch.Tensor,
    table: ParameterTable,
    source: FittedTexts | Start | None,
) -> ItemCodes | None:
    """The vectors that items share, where they do; nothing else here needs the keys."""
    if config.head.codes is None:
        return None
    centroids = source.code_centroids(config.head.codes) if source else None
    chosen = source.text_codes if isinstance(source, FittedTexts) else None
    return make_codes(config.head.codes, keys(), texts, centroids, table.per_code, chosen)


def _identities(
    backbone: Backbone, prompt: Prompt, catalogue: Catalogue, codes: ItemCodes | None
) -> dict[str, str]:
    """What all who train together must agree on; see `ParameterTable.contract`."""
    items = catalogue.content_hash()
    if codes is not None:
        items = hashlib.sha256(f"{items}/{codes.identity()}".encode()).hexdigest()
    return {
        "backbone_hash": backbone.weights_hash,
        "prompt_hash": prompt.content_hash(),
        "catalogue_hash": items,
    }


def _whitenings(
    states: ItemStates, source: FittedTexts | Start | None
) -> tuple[Normaliser, Normaliser]:
    """The whitening of user states, and that of items: given, or fitted to a catalogue."""
    if source is not None:
        return source.whitenings(states)
    normaliser = fit_normaliser(states.prompt)
    return normaliser, normaliser if states.share_a_space else fit_normaliser(states.items)


def _load_backbone(config: ExperimentConfig, device: torch.device, start: Start | None) -> Backbone:
    """The backbone; that of another base than the start's is refused, if possible unloaded."""
    if config.ablation is Ablation.RANDOM_WEIGHTS:
        return with_random_weights(load_backbone(config.backbone, device), config.seed)
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
            "or choose a prompt without ratings such as next_item.v2"
        )
    return prompt
