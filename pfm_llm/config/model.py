"""Settings of the model: windows, adapters, head. What a published adapter says of itself."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pfm_llm.config.choices import ItemIds, PrivateKind

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A group of settings: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class WindowConfig(Settings):
    """How a history is cut into passes."""

    items: PositiveCount = Field(16, description="items per window")
    max_windows: PositiveCount | None = Field(
        None, description="train on the newest so many windows; None: the whole history"
    )
    max_item_tokens: PositiveCount = Field(32, description="longer item texts are cut")


class LoraAdapterConfig(Settings):
    """One LoRA adapter."""

    rank: PositiveCount = 8
    alpha: PositiveCount = 16
    dropout: Fraction = 0.0


class TasteConfig(Settings):
    """The private taste vector; see taste.py."""

    rank: PositiveCount = Field(16, description="numbers a user, where the next item's are fitted")
    like_rank: PositiveCount = Field(8, description="numbers a user and fit for likes")
    like_fits: PositiveCount = Field(4, description="fits for likes, of one basis each; averaged")
    read_rank: Count = Field(128, description="numbers a user, read off what was met; 0: fitted")
    dropout: Fraction | None = Field(
        None, description="dropout on vectors that are read; None: that of the head"
    )
    read_events: Positive = Field(5.0, description="events that a read past shrinks by, at first")
    precision: Positive = Field(30.0, description="of the prior where fitted, before training")
    half_life: Positive = Field(20.0, description="in events, next item fitted; before training")
    half_life_like: Positive = Field(100.0, description="the same for likes, which drift slowly")
    block: PositiveCount = Field(8, description="events that one fitted vector predicts at once")


class PrivateAdapterConfig(LoraAdapterConfig):
    """The adapter that never leaves its client."""

    enabled: bool = True
    rank: PositiveCount = 4
    alpha: PositiveCount = 8
    kind: PrivateKind = PrivateKind.TASTE
    on_layers: bool = Field(True, description="false: on the head alone (not of kind taste)")
    taste: TasteConfig = TasteConfig()
    head_rank: Count = Field(4, description="rank of the private head term; 0: none")
    weight: float = Field(1.0, ge=0, le=1.5, description="private_weight at serving time")

    @property
    def is_taste(self) -> bool:
        """Whether it is on, and a taste vector."""
        return self.enabled and self.kind is PrivateKind.TASTE


class AdaptersConfig(Settings):
    """Where and how large the adapters are."""

    num_layers: PositiveCount = Field(2, description="adapted layers, counted from the top")
    targets: tuple[str, ...] | str = Field("all-linear", description="module names, or all-linear")
    shared: LoraAdapterConfig = LoraAdapterConfig()
    private: PrivateAdapterConfig = PrivateAdapterConfig()


class HeadConfig(Settings):
    """The recommender head, part of the shared state."""

    dim: PositiveCount = Field(256, description="dimensions of the whitened text space")
    item_bias: bool = True
    item_ids: ItemIds = ItemIds.BOTH
    id_dim: PositiveCount = Field(64, description="dimensions of an item's learned embedding")
    item_context: bool = Field(
        True, description="a linear way from the window's items to the user vector"
    )
    dropout: Fraction = Field(
        0.4,
        description="dropout on user vectors, and on tastes read without one of their own",
    )
