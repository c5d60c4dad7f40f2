"""Settings of the machine and of files. None of them changes the trained tensors."""

from pydantic import Field

from pfm_llm.config.model import Count, NonNegative, PositiveCount, Settings


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
