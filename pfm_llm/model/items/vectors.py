"""Vectors of the texts of a catalogue: frozen states of an encoder, cached between runs.

The states depend on the catalogue and not on any user. The public cache therefore keeps them, under
a hash of everything that they depend on.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pfm_llm.base import assets, files
from pfm_llm.base.errors import CorruptFileError, StorageError
from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Pooling
from pfm_llm.config.model import ItemsConfig
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.items.sentence_encoder import SentenceEncoder, load_sentence_encoder
from pfm_llm.text.encoding import HistoryEncoder

_log = logging.getLogger(__name__)
ITEM_TOKENS = 4096
"""Padded tokens of texts in one pass."""


@dataclass(frozen=True)
class ItemStates:
    """Frozen states of the texts of a catalogue.

    Attributes:
        items: float32 [I, w], from the encoder of items; they become item vectors.
        prompt: float32 [I, d], the backbone's states at the last token of each item, as a history
            shows it. User states are whitened by them.
        encoder_hash: Identity of the encoder of items; None: the backbone.
    """

    items: torch.Tensor
    prompt: torch.Tensor
    encoder_hash: str | None

    @property
    def share_a_space(self) -> bool:
        """Whether items and user states are of one space, in which similarity has a meaning."""
        return self.items is self.prompt


def item_states(config: ItemsConfig, backbone: Backbone, encoder: HistoryEncoder) -> ItemStates:
    """Encode the catalogue, or read its states from the cache.

    Args:
        config: The encoder of items.
        backbone: The language model.
        encoder: Renders and tokenises the catalogue.

    Raises:
        BackboneError: The encoder cannot be loaded.
    """
    shown = encoder.prompt_pieces()
    prompt = backbone_states(backbone, shown)
    if config.is_backbone:
        pieces = encoder.catalogue_pieces(config.max_tokens)
        if pieces == shown and config.pooling is Pooling.LAST:
            return ItemStates(prompt, prompt, None)
        return ItemStates(backbone_states(backbone, pieces, config.pooling), prompt, None)
    items, identity = sentence_states(config, encoder)
    return ItemStates(items, prompt, identity)


def backbone_states(
    backbone: Backbone, pieces: list[list[int]], pooling: Pooling = Pooling.LAST
) -> torch.Tensor:
    """The backbone's states of some texts, float32 [len(pieces), d], from the cache if it has them.

    Args:
        backbone: The language model.
        pieces: Token ids of each text.
        pooling: How the states of its tokens become one.
    """
    parts = (*identity_of(backbone), pooling.value)
    return kept_states(parts, pieces, lambda: read_texts(backbone, pieces, pooling))


def sentence_states(config: ItemsConfig, encoder: HistoryEncoder) -> tuple[torch.Tensor, str]:
    """The vectors that a sentence encoder makes of the catalogue, from the cache if it has them.

    Args:
        config: The encoder.
        encoder: Renders the catalogue.

    Returns:
        Vectors of unit length, float32 [I, w], and the encoder's identity.

    Raises:
        BackboneError: The encoder cannot be loaded.
    """
    sentences, texts = load_sentence_encoder(config), encoder.catalogue_texts()
    parts = (sentences.identity, str(config.max_tokens))
    items = kept_states(parts, texts, lambda: _encode(sentences, texts))
    return items, sentences.identity


def identity_of(backbone: Backbone) -> tuple[str, ...]:
    """All that the states of a text depend on, besides its tokens and how they are pooled."""
    return backbone.weights_hash, str(backbone.dtype), backbone.device.type


def read_texts(
    backbone: Backbone,
    pieces: list[list[int]],
    pooling: Pooling = Pooling.LAST,
    layers: nn.Module | None = None,
) -> torch.Tensor:
    """`Backbone.text_states` of a catalogue, with a progress bar."""
    what = "reading the items' texts" + ("" if layers is None else " for histories")
    with Progress(sum(map(len, pieces)), what, unit="tokens") as progress:
        return backbone.text_states(pieces, ITEM_TOKENS, pooling, progress, layers)


def _encode(encoder: SentenceEncoder, texts: list[str]) -> torch.Tensor:
    with Progress(len(texts), "encoding the items' texts", unit="texts") as progress:
        return encoder(texts, progress)


def kept_states(
    parts: tuple[str, ...], texts: object, compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Frozen states of a catalogue, read from the public cache where it has them.

    Args:
        parts: All that they depend on besides the texts.
        texts: The texts, or their tokens, in plain Python types.
        compute: Computes them, where the cache lacks them.
    """
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    key = hashlib.sha256("/".join((*parts, digest)).encode()).hexdigest()[:32]
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
    states = compute()
    try:
        files.write_tensors(path, {"states": states}, {"sha256": _sha256(states)})
    except StorageError as error:
        # A run works without the cache: it then computes the states each time.
        _log.warning("item states: %s; going on without keeping them", error)
    return states


def _sha256(states: torch.Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()
