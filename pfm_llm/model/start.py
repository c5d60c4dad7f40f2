"""The published adapter that a new model starts from."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from pfm_llm.base.errors import ArtefactError
from pfm_llm.config.model import CodesConfig
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.items.vectors import ItemStates
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.protocol.parameters import Parameter, ParameterTable
from pfm_llm.protocol.types import Group, SharedState, Tensors, of_group
from pfm_llm.text.prompts import Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A published adapter whose tensors fit the current catalogue.

    Attributes:
        origin: Where the adapter came from, for messages.
        base_name: Name of the base model that it was trained on.
        weights_hash, tokenizer_hash: The hashes of that base model.
        prompt: Key of the prompt that it was trained with.
        prompt_hash: Hash of the content of that prompt.
        normalisers: The whitenings of user states and of items that its head was trained with;
            never refitted.
        item_encoder: Identity of the encoder of items; None: the base model.
        tensors: Its shared tensors; their rows of items follow the current catalogue.
        settings: The settings that its shapes follow from, for messages, by keys of the config.
        codes: The books of the vectors that its items share; None: each has rows of its own.
        centroids: Those of its books of texts, float32 [T, S, w]; None without any.
        knows_items: Whether the catalogue has an item that the adapter was trained on.
    """

    origin: str
    base_name: str
    weights_hash: str
    tokenizer_hash: str
    prompt: str
    prompt_hash: str
    normalisers: tuple[Normaliser, Normaliser]
    item_encoder: str | None
    tensors: Tensors
    settings: Mapping[str, Any]
    codes: CodesConfig | None = None
    centroids: torch.Tensor | None = None
    knows_items: bool = True

    def whitenings(self, states: ItemStates) -> tuple[Normaliser, Normaliser]:
        """The whitenings of user states and of items, for a catalogue.

        That of items is rescaled for a catalogue of which the adapter knows no item; see
        `Normaliser.rescaled`. What is trained from there on is published with it.
        """
        normaliser, of_items = self.normalisers
        return normaliser, of_items if self.knows_items else of_items.rescaled(states.items)

    def check_base(self, backbone: Backbone, allow_mismatch: bool) -> None:
        """Compare the base model of the adapter with the current backbone.

        Args:
            backbone: The current backbone.
            allow_mismatch: Warn instead of raising.

        Raises:
            ArtefactError: The adapter was trained on another base.
        """
        found = {"the weights": backbone.weights_hash, "the tokens": backbone.tokenizer_hash}
        self._compare(backbone.name, found, allow_mismatch)

    def check_weights(self, name: str, weights_hash: str) -> None:
        """Compare a base model's weights with those of the adapter, before they are loaded.

        Args:
            name: Name of the base model.
            weights_hash: See `backbone.hash_weights`.

        Raises:
            ArtefactError: The adapter was trained on others.
        """
        self._compare(name, {"the weights": weights_hash}, False)

    def check_item_encoder(self, states: ItemStates, name: str) -> None:
        """Compare the vectors of items with those that the adapter was trained on.

        Raises:
            ArtefactError: They are of another encoder.
        """
        if states.encoder_hash != self.item_encoder:
            whose = (
                (self.item_encoder, self.normalisers[1].mean),
                (states.encoder_hash, states.items),
            )
            theirs, ours = (
                f"{'the base model' if known is None else f'an encoder of SHA-256 {known[:16]}…'} "
                f"with {vectors.shape[-1]} numbers"
                for known, vectors in whose
            )
            raise ArtefactError(
                f"{self.origin} was trained on item vectors of {theirs}, those of items.encoder: "
                f"{name} are of {ours}; set items.encoder (item_encoder or --item-encoder where "
                "you recommend) to the adapter's"
            )

    def code_centroids(self, codes: CodesConfig) -> torch.Tensor | None:
        """The centroids of the adapter's codes, float32 [T, S, w]; they are never fitted anew.

        Args:
            codes: The books of the config.

        Raises:
            ArtefactError: The adapter has other books. Equal shapes are not enough: two books of
                1,024 vectors are not one of 2,048.
        """
        if codes != self.codes:
            theirs = "none" if self.codes is None else str(self.codes)
            raise ArtefactError(
                f"{self.origin} was trained with head.codes: {theirs}, the config asks for "
                f"{codes}; set head.item_ids and head.codes as the adapter has them"
            )
        return self.centroids

    def _compare(self, name: str, found: Mapping[str, str], allow_mismatch: bool) -> None:
        known = {"the weights": self.weights_hash, "the tokens": self.tokenizer_hash}
        differing = [
            f"{what} of {self.base_name} have SHA-256 {known[what][:16]}…, those of {name} "
            f"{own[:16]}…"
            for what, own in found.items()
            if known[what] != own
        ]
        if not differing:
            return
        message = f"{self.origin} was trained on another base: {'; '.join(differing)}"
        if allow_mismatch:
            _log.warning("%s; going on, as asked", message)
            return
        raise ArtefactError(
            f"{message}. Use the base that it names, or allow the mismatch (--allow-base-mismatch, "
            "init_from.allow_base_mismatch) and expect worse recommendations"
        )

    def shared(self, table: ParameterTable, prompt: Prompt) -> SharedState:
        """The shared state of the adapter. A basis that the adapter lacks is drawn anew.

        Args:
            table: The shared tensors of the config.
            prompt: The prompt of the config.

        Raises:
            ArtefactError: The adapter was trained with another prompt, or has other shapes.
        """
        if prompt.content_hash() != self.prompt_hash:
            raise ArtefactError(
                f"{self.origin} was trained with prompt {self.prompt}, the config asks for "
                f"{prompt.key}; set prompt: to the adapter's"
            )
        unused = of_group(self.tensors, Group.BASIS).keys() - table.keys()
        tensors = {name: value for name, value in self.tensors.items() if name not in unused}
        for name, parameter in of_group(table, Group.BASIS).items():
            if name not in tensors:
                tensors[name] = parameter.initial()
        for name in {**table, **tensors}:
            theirs, ours = tensors.get(name), table.get(name)
            if theirs is None or ours is None or tuple(theirs.shape) != ours.shape:
                raise ArtefactError(self._does_not_fit(name, theirs, ours))
        return SharedState({name: tensors[name] for name in table})

    def _does_not_fit(self, name: str, theirs: torch.Tensor | None, ours: Parameter | None) -> str:
        there, here = (
            "absent" if known is None else str(list(known.shape)) for known in (theirs, ours)
        )
        settings = yaml.safe_dump(self.settings, default_flow_style=True, width=math.inf).strip()
        return (
            f"{self.origin} does not fit the config: {name} is {there} there and {here} here. Set "
            f"adapters and head as the adapter has them: {settings}"
        )
