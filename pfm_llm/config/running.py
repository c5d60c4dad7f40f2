"""Settings of measures, of the machine and of files, and of where a run starts from."""

from typing import Annotated

from pydantic import Field

from pfm_llm.config.choices import HeldOutSplit
from pfm_llm.config.model import Count, Fraction, NonNegative, PositiveCount, Settings


class EvaluationConfig(Settings):
    """The measures, and when they are taken."""

    every: Count | None = Field(
        None,
        description="rounds between validations; 0: validate at the end only; None: a quarter of "
        "the rounds, at most 100",
    )
    ks: tuple[PositiveCount, ...] = (5, 10, 20)
    num_negatives: PositiveCount = 99
    bootstrap: PositiveCount = Field(1000, description="bootstrap resamples for the intervals")
    confidence: Fraction = 0.95
    max_users: PositiveCount | None = Field(
        300, description="a fixed random sample of users for the validations during training"
    )
    private_weights: tuple[Annotated[float, Field(ge=0, le=1.5)], ...] | None = Field(
        None,
        description="adapters.private.weight is chosen from these, on validation; None: from 0 to "
        "1 in steps of .25, where the private part is read off the history, that weight is 1 and "
        "federation.privacy is off",
    )
    baselines: tuple[str, ...] = ("popularity", "ease", "markov_recency")
    splits: tuple[HeldOutSplit, ...] = Field(
        (HeldOutSplit.TEST,), description="splits in the final results"
    )


class CacheConfig(Settings):
    """The cache of trunk states, which are private data: they reproduce the history."""

    max_gb: NonNegative = Field(4.0, description="limit; beyond it, states are recomputed")
    dir: str | None = Field(
        None, description="private folder, to reuse trunk states between runs; None: of the run"
    )


class RuntimeConfig(Settings):
    """The machine."""

    threads: PositiveCount | None = Field(None, description="None: cores / local processes")
    tokens_per_chunk: PositiveCount = Field(2048, description="tokens of one many-clients pass")
    trackers: tuple[str, ...] = Field((), description="accelerate trackers, e.g. tensorboard")


class PushToHubConfig(Settings):
    """Publishing of the shared adapter, during and after training."""

    repo: str = Field(description="user/name")
    every: Count = Field(0, description="rounds between pushes; 0: push at the end only")
    private: bool = Field(True, description="make the repository private when it is created")
    tag: str | None = Field(None, description="tag of the last push")


class OutputConfig(Settings):
    """Where a run writes its files."""

    dir: str = Field("runs", description="holds <name>/ and, apart from it, <name>.private/")
    checkpoint_every: PositiveCount | None = Field(
        None, description="rounds between commits; None: a sixth of the rounds, at most 50"
    )


class InitFromConfig(Settings):
    """A published adapter to start from."""

    adapter: str = Field(description="Hub id, or a folder that was exported or pulled")
    revision: str | None = Field(None, description="commit, tag or branch of a Hub id")
    allow_base_mismatch: bool = Field(
        False, description="accept an adapter that was trained on other base weights"
    )
