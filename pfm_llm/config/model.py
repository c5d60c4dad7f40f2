"""Settings of the model: windows, adapters, head. A published adapter carries them."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pfm_llm.config.choices import ItemIds, Pooling, Reading
from pfm_llm.config.private_kinds import PRIVATE_KINDS

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
_LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
PositiveCount = Annotated[int, Field(ge=1, le=_LARGEST)]
_LARGEST_RANK = 4096
Books = Annotated[int, Field(ge=0, le=16)]
Rank = Annotated[int, Field(ge=1, le=_LARGEST_RANK)]
Rank0 = Annotated[int, Field(ge=0, le=_LARGEST_RANK)]
BACKBONE_ENCODER = "backbone"
DETAILED_TOKENS = 64
_ITEM_DROPOUT = 0.1
_KIND = "hyper_lora"
_RANK = "columns of B and rows of A; set alone, it leaves alpha as it is"
_ALPHA = "the product B A counts alpha / rank"
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A group of settings: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class WindowConfig(Settings):
    """How a history is cut into windows; the model reads one window in one pass."""

    items: PositiveCount = Field(64, description="items per window")
    max_windows: PositiveCount | None = Field(
        None, description="train on this many of the newest windows; None: all windows"
    )
    max_item_tokens: PositiveCount = Field(32, description="tokens kept of an item's text")
    reading: Reading = Field(
        Reading.ITEMS,
        description="items: the adapted layers read one state for each item, whose text the layers "
        "below have read by itself; tokens: they read all tokens of a window",
    )


class ItemsConfig(Settings):
    """How the text of an item becomes a vector."""

    encoder: str = Field(
        "minilm",
        description="backbone; minilm (embedded); or the Hub id or folder of a sentence encoder",
    )
    revision: str | None = Field(None, description="Hub revision of the encoder")
    pooling: Pooling = Field(
        Pooling.LAST, description="of the backbone's states; a sentence encoder has its own"
    )
    max_tokens: PositiveCount | None = Field(
        None,
        description="tokens read of an item's text; None: window.max_item_tokens, or "
        f"{DETAILED_TOKENS} where the prompt shows details or a sentence encoder reads",
    )

    @property
    def is_backbone(self) -> bool:
        """Whether the language model that reads histories encodes the items too."""
        return self.encoder == BACKBONE_ENCODER


class LoraAdapterConfig(Settings):
    """One LoRA adapter.

    ``rank`` and ``alpha`` are set each by itself, as in PEFT. Where ``rank`` alone is set,
    ``alpha`` stays, so a larger rank has a smaller scale.
    """

    rank: Rank = Field(8, description=_RANK)
    alpha: PositiveCount = Field(16, description=_ALPHA)
    dropout: Fraction = 0.0

    @property
    def scale(self) -> float:
        """The factor of the product B A: alpha / rank."""
        return self.alpha / self.rank


class SharedAdapterConfig(LoraAdapterConfig):
    """The adapter that the server aggregates."""

    # Not dumped while it is off: hashes of settings that were made before it stay as they are.
    use_rslora: bool = Field(
        False,
        description="scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)",
        exclude_if=lambda value: not value,
    )

    @property
    def scale(self) -> float:
        """The factor of the product B A: alpha / rank or, rank-stabilised, alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class TasteConfig(Settings):
    """The user embedding, kind ``taste``; see model/private/taste.py."""

    rank: Rank = Field(16, description="size of a fitted embedding, next item")
    like_rank: Rank = Field(8, description="size of each fitted embedding, likes")
    read_rank: Rank0 = Field(128, description="size of one computed from the history; 0: fit one")
    dropout: Fraction | None = Field(
        0.7, description="dropout on embeddings computed from the history; None: as in head"
    )


class PrivateAdapterConfig(LoraAdapterConfig):
    """The adapter that never leaves its client."""

    enabled: bool = True
    rank: Rank = Field(4, description=f"{_RANK}; with kind hyper_lora 16 unless it is set")
    alpha: PositiveCount = Field(8, description=f"{_ALPHA}; with kind hyper_lora 16 unless set")
    kind: str = Field(_KIND, description="one of config/private_kinds.py")
    options: dict[str, Any] = Field({}, description="settings of a kind that reads its own")
    on_layers: bool = Field(True, description="false: on the head alone (not of kind taste)")
    # Not dumped while it is 0: hashes of earlier settings stay as they are.
    steps: Count = Field(
        0,
        description="gradient steps at home on a LoRA that was read off the history, kept where "
        "the user's own past says that they help; see client/private_steps.py",
        exclude_if=lambda value: not value,
    )
    taste: TasteConfig = TasteConfig()
    head_rank: Rank0 = Field(4, description="rank of the private head term; 0: none")
    weight: float = Field(1.0, ge=0, le=1.5, description="factor of the private part in serving")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_kind(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        spec = PRIVATE_KINDS.get(str(tree.get("kind", _KIND)))
        return tree if spec is None else {**spec.defaults, **tree}

    @field_validator("kind")
    @classmethod
    def _is_registered(cls, kind: str) -> str:
        if kind not in PRIVATE_KINDS:
            raise ValueError(f"no private kind {kind!r}; valid: {', '.join(PRIVATE_KINDS)}")
        return kind


class AdaptersConfig(Settings):
    """The place and size of the adapters."""

    num_layers: PositiveCount = Field(2, description="adapted layers, counted from the top")
    targets: tuple[str, ...] | str = Field("all-linear", description="module names, or all-linear")
    shared: SharedAdapterConfig = SharedAdapterConfig()
    private: PrivateAdapterConfig = PrivateAdapterConfig()


class CodesConfig(Settings):
    """The vectors that items share, with ``item_ids: codes``; see model/items/codes.py."""

    text_books: Books = Field(1, description="vectors of an item that follow from its text")
    text_size: PositiveCount = Field(128, description="vectors in each book of texts")
    hash_books: Books = Field(3, description="vectors of an item that follow from its key")
    hash_size: PositiveCount = Field(1024, description="vectors in each book of keys")
    met_size: PositiveCount = Field(
        8192, description="entries in each of the 3 books of head.item_met, a Bloom filter"
    )

    @model_validator(mode="after")
    def _has_books(self) -> "CodesConfig":
        if not self.text_books + self.hash_books:
            raise ValueError(
                "text_books and hash_books are both 0, so an item would have no vector; set one "
                "of them to at least 1, or head.item_ids: none"
            )
        return self


class HeadConfig(Settings):
    """The recommender head, part of the shared state."""

    dim: PositiveCount = Field(256, description="dimensions of the whitened text space")
    item_bias: bool = True
    item_ids: ItemIds = Field(
        ItemIds.BOTH,
        description="where a learned embedding of each item is used; codes: as both, and it is "
        "a sum of vectors that items share, so that a message does not grow with the catalogue",
    )
    # Not dumped where it is None: hashes of settings that were made before it stay as they are.
    codes: CodesConfig | None = Field(
        None, description="with item_ids: codes", exclude_if=lambda value: value is None
    )
    id_dim: PositiveCount = Field(64, description="dimensions of an item's learned embedding")
    item_context: bool = Field(
        True, description="add a linear function of the window's items to the user vector"
    )
    item_met: bool = Field(
        True,
        description="learn which items somebody has met; others are no negatives in training, and "
        "have no embedding; no effect with other aggregates than the mean, and where nothing is "
        "shared",
    )
    item_dropout: Fraction = Field(
        _ITEM_DROPOUT,
        description="share of the items that a step treats as new, to learn the bias of items that "
        "nobody has met; unless it is set, it is 0 where the head leaves it without effect; no "
        "effect with other aggregates than the mean, and where nothing is shared",
    )
    prior_events: Positive | None = Field(
        5.0,
        description="n: what r items tell of a user counts r / (r + n); learned from here on; "
        "None: it counts whole",
    )
    dropout: Fraction = Field(
        0.7,
        description="dropout on user vectors; also on user embeddings with taste.dropout: None",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_codes(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("item_ids") == ItemIds.CODES:
            return {**tree, "codes": {} if tree.get("codes") is None else tree["codes"]}
        return tree

    @model_validator(mode="before")
    @classmethod
    def _with_item_dropout(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or "item_dropout" in tree:
            return tree
        learns = tree.get("item_met", True) and tree.get("item_bias", True)
        has_effect = learns and tree.get("item_ids") != ItemIds.CODES
        return {**tree, "item_dropout": _ITEM_DROPOUT if has_effect else 0.0}

    @model_validator(mode="after")
    def _codes_have_an_effect(self) -> "HeadConfig":
        if self.codes is not None and self.item_ids is not ItemIds.CODES:
            raise ValueError(
                f"codes has no effect with item_ids: {self.item_ids}; set item_ids: codes, or "
                "leave codes out"
            )
        return self

    @model_validator(mode="after")
    def _new_items_have_a_bias(self) -> "HeadConfig":
        if not self.item_dropout:
            return self
        if not (self.item_met and self.item_bias):
            raise ValueError(
                "item_dropout learns the bias of items that nobody has met; set item_met: true and "
                "item_bias: true, or item_dropout: 0"
            )
        if self.item_ids is ItemIds.CODES:
            raise ValueError(
                "item_dropout has no effect with item_ids: codes, where an item that nobody has "
                "met has the bias of its text's codes; set item_dropout: 0"
            )
        return self
