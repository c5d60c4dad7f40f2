"""Backbone, adapter, head and encoder of a config: what training and serving have in common.

Started anew, the whitening is fitted on the catalogue and the shared state drawn. Started from a
published adapter, both are the adapter's: the whitening is never refitted, and what belongs to
single items follows them by key.
"""

import hashlib
import logging
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import nn

from pfm_llm import head as recommender_head
from pfm_llm import taste
from pfm_llm.alignment import Alignment, align_items, aligned_tensors, item_keys
from pfm_llm.artefact import Artefact
from pfm_llm.backbone import Backbone, load_backbone
from pfm_llm.base import assets, files
from pfm_llm.base.errors import ArtefactError, CorruptFileError, DataError, StorageError
from pfm_llm.cohort_model import BASIS, CohortModel
from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import uses_taste
from pfm_llm.data.interactions import Catalogue
from pfm_llm.dual_adapter import DualAdapter
from pfm_llm.head import Normaliser
from pfm_llm.objective import Objective
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.types import SharedState
from pfm_llm.text.encoding import HistoryEncoder
from pfm_llm.text.prompts import Prompt, load_prompt

_log = logging.getLogger(__name__)
_ITEM_BATCH_TOKENS = 4096
_BASIS_SETTINGS = (
    "kind",
    "rank",
    "head_rank",
    "taste.rank",
    "taste.read_rank",
    "taste.like_rank",
    "taste.like_fits",
)
"""Of the private adapter: what the shapes of its basis follow from, beside those of the head."""


@dataclass(frozen=True)
class ModelParts:
    """The objects of a model over a catalogue, wired.

    Attributes:
        backbone: The frozen model.
        trunk: Its layers below the adapted ones.
        prompt: The template.
        encoder: Renders histories.
        adapter: Shared and private LoRA in PEFT's terms.
        normaliser: The catalogue's whitening, or that of the adapter it starts from.
        model: The many-clients model.
        shared: The shared state that it starts with.
        contract: What updates may hold.
        alignment: How the items fit those of the adapter that it starts from, if it does.
    """

    backbone: Backbone
    trunk: nn.Module
    prompt: Prompt
    encoder: HistoryEncoder
    adapter: DualAdapter
    normaliser: Normaliser
    model: CohortModel
    shared: SharedState
    contract: UpdateContract
    alignment: Alignment | None


def build_model(
    config: ExperimentConfig,
    catalogue: Catalogue,
    ratings: np.ndarray | None,
    device: torch.device,
    artefact: Artefact | None = None,
) -> ModelParts:
    """Wire a model.

    Args:
        config: Prompt, backbone, window, adapters and head.
        catalogue: The items.
        ratings: Every rating that a history may show; None where there are none.
        device: Where to.
        artefact: A published adapter to start from.

    Raises:
        DataError: The prompt needs what the data lacks, or a window exceeds the context.
        BackboneError: The model cannot be had or adapted.
        ArtefactError: The adapter stands on another base, or has other shapes than the config.
    """
    prompt = _load_prompt(config.prompt, ratings)
    backbone = load_backbone(config.backbone, device)
    if artefact is not None:
        _check_base(artefact, backbone, config)
    encoder = _encoder(config, catalogue, ratings, prompt, backbone)
    adapter = DualAdapter(backbone, config.adapters)
    trunk, top = backbone.split(config.adapters.num_layers)
    states = item_states(backbone, encoder, prompt, catalogue.content_hash())
    shared = _initial_shared(config, adapter, backbone.hidden_size, len(catalogue))
    alignment = None
    if artefact is None:
        normaliser = recommender_head.fit_normaliser(states)
    else:
        normaliser = artefact.normaliser()
        alignment = align_items(artefact.item_keys(), item_keys(catalogue, artefact.prompt()))
        shared = _shared_of(artefact, alignment, shared, prompt)
    texts = normaliser(states)[:, : config.head.dim].contiguous()
    return ModelParts(
        backbone=backbone,
        trunk=trunk,
        prompt=prompt,
        encoder=encoder,
        adapter=adapter,
        normaliser=normaliser,
        model=CohortModel(
            top, adapter.top_paths(), adapter.scales(), normaliser, _objective(config, texts)
        ),
        shared=shared,
        contract=_contract(_trained(config, shared), backbone, prompt, catalogue),
        alignment=alignment,
    )


def _load_prompt(name: str, ratings: np.ndarray | None) -> Prompt:
    prompt = load_prompt(name)
    if prompt.uses_rating and ratings is None:
        raise DataError(
            f"prompt {prompt.key} shows ratings and the data has none; set data.columns.rating, "
            "or choose a prompt without ratings such as next_item.v1"
        )
    return prompt


def _encoder(
    config: ExperimentConfig,
    catalogue: Catalogue,
    ratings: np.ndarray | None,
    prompt: Prompt,
    backbone: Backbone,
) -> HistoryEncoder:
    values = () if ratings is None else tuple(np.unique(ratings).tolist())
    return HistoryEncoder(
        prompt, catalogue, backbone.tokenizer, config.window, backbone.max_tokens, values
    )


def _objective(config: ExperimentConfig, texts: torch.Tensor) -> Objective:
    block = config.adapters.private.taste.block if uses_taste(config) else None
    return Objective(texts, config.tasks, block, config.federation.local.unseen_only)


def _trained(config: ExperimentConfig, shared: SharedState) -> SharedState:
    """The part of the shared state that the method trains and that is sent."""
    if config.method is None:
        return shared
    spec = SPECS[config.method]
    return SharedState({n: value for n, value in shared.tensors.items() if spec.trains(n)})


def _contract(
    shared: SharedState, backbone: Backbone, prompt: Prompt, catalogue: Catalogue
) -> UpdateContract:
    return UpdateContract.from_shared(
        shared,
        backbone_hash=backbone.weights_hash,
        prompt_hash=prompt.content_hash(),
        catalogue_hash=catalogue.content_hash(),
    )


def _initial_shared(
    config: ExperimentConfig, adapter: DualAdapter, hidden_size: int, num_items: int
) -> SharedState:
    head = recommender_head.initial_head(
        config.head, hidden_size, num_items, config.seed, config.tasks
    )
    tensors = {**adapter.initial_shared(config.seed), **head}
    if uses_taste(config):
        settings = config.adapters.private.taste
        tensors |= taste.initial_basis(settings, config.tasks, config.head, num_items, config.seed)
    return SharedState(tensors)


def initial_private(
    config: ExperimentConfig, adapter: DualAdapter, client_id: str
) -> dict[str, torch.Tensor]:
    """A client's private tensors before it has trained any; they change nothing."""
    if uses_taste(config):
        return taste.initial_vectors(config.adapters.private.taste, config.tasks, config.head)
    return adapter.initial_private(config.seed, client_id, config.head.dim)


def _check_base(artefact: Artefact, backbone: Backbone, config: ExperimentConfig) -> None:
    wanted = artefact.manifest.base
    differing = [
        f"{what} of {wanted.name} have SHA-256 {theirs[:16]}…, those of {backbone.name} {own[:16]}…"
        for what, theirs, own in (
            ("the weights", wanted.weights_sha256, backbone.weights_hash),
            ("the tokens", wanted.tokenizer_sha256, backbone.tokenizer_hash),
        )
        if theirs != own
    ]
    if not differing:
        return
    message = f"{artefact.origin} was trained on another base: {'; '.join(differing)}"
    if config.init_from is not None and config.init_from.allow_base_mismatch:
        _log.warning("%s; going on, as asked", message)
        return
    raise ArtefactError(
        f"{message}. Use the base that it names, or allow the mismatch (--allow-base-mismatch, "
        "init_from.allow_base_mismatch) and expect worse recommendations"
    )


def _shared_of(
    artefact: Artefact, alignment: Alignment, initial: SharedState, prompt: Prompt
) -> SharedState:
    """The adapter's shared state over this catalogue; a basis that it lacks starts anew."""
    if prompt.content_hash() != artefact.manifest.prompt_sha256:
        raise ArtefactError(
            f"{artefact.origin} was trained with prompt {artefact.manifest.prompt}, the config "
            f"asks for {prompt.key}; set prompt: to the adapter's"
        )
    found = aligned_tensors(artefact.shared_tensors(), alignment)
    tensors = {}
    for name, value in initial.tensors.items():
        if name not in found and name.startswith(BASIS):
            found[name] = value
        if name not in found or found[name].shape != value.shape:
            raise ArtefactError(_does_not_fit(artefact, name, found.get(name), value))
        tensors[name] = found[name]
    unused = [n for n in found if n not in initial.tensors and not n.startswith(BASIS)]
    if unused:
        raise ArtefactError(_does_not_fit(artefact, unused[0], found[unused[0]], None))
    return SharedState(tensors)


def _does_not_fit(
    artefact: Artefact, name: str, theirs: torch.Tensor | None, ours: torch.Tensor | None
) -> str:
    there, here = (
        "absent" if tensor is None else str(list(tensor.shape)) for tensor in (theirs, ours)
    )
    head, adapters = artefact.manifest.head, artefact.manifest.adapters
    if name.startswith(BASIS):
        theirs_are = [
            f"private.{setting} {attrgetter(setting)(adapters.private)}"
            for setting in _BASIS_SETTINGS
        ]
    else:
        theirs_are = [
            f"num_layers {adapters.num_layers}",
            f"shared.rank {adapters.shared.rank}",
            f"head.dim {head.dim}",
            f"head.item_ids {head.item_ids}",
            f"head.id_dim {head.id_dim}",
            f"head.item_bias {str(head.item_bias).lower()}",
        ]
    return (
        f"{artefact.origin} does not fit the config: {name} is {there} there and {here} here. Set "
        f"adapters and head as the adapter has them: {', '.join(theirs_are)}"
    )


def item_states(
    backbone: Backbone, encoder: HistoryEncoder, prompt: Prompt, catalogue_hash: str
) -> torch.Tensor:
    """Frozen states of the catalogue's texts, [I, d] float32, kept between runs.

    They depend on the catalogue alone, not on any user, so they are kept in the public cache
    under a key of all that they depend on.
    """
    parts = (
        backbone.weights_hash,
        str(backbone.dtype),
        backbone.device.type,
        prompt.content_hash(),
        str(encoder.config.max_item_tokens),
        catalogue_hash,
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
    except (CorruptFileError, KeyError) as error:
        _log.warning("item states: %s; computing them again", error)
    states = backbone.last_token_states(encoder.catalogue_pieces(), _ITEM_BATCH_TOKENS)
    try:
        files.write_tensors(path, {"states": states}, {"sha256": _sha256(states)})
    except StorageError as error:
        # A cache is a convenience: without it they are computed each time.
        _log.warning("item states: %s; going on without keeping them", error)
    return states


def _sha256(states: torch.Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()
