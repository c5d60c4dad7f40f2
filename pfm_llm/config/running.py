"""Settings of how and where a run works. None of them changes what is trained."""

from pydantic import Field

from pfm_llm.config.model import Count, NonNegative, PositiveCount, Settings


class CacheConfig(Settings):
    """Cached trunk states. They reproduce the history: private data."""

    max_gb: NonNegative = Field(4.0, description="beyond it: recompute")
    dir: str | None = Field(
        None, description="another private folder, to reuse trunk states between runs"
    )


class RuntimeConfig(Settings):
    """The machine."""

    threads: PositiveCount | None = Field(None, description="None: cores / local processes")
    tokens_per_chunk: PositiveCount = Field(2048, description="tokens of one many-clients pass")
    trackers: tuple[str, ...] = Field((), description="accelerate trackers, e.g. tensorboard")


class PushToHubConfig(Settings):
    """Publishing the shared adapter while and after training."""

    repo: str = Field(description="user/name")
    every: Count = Field(0, description="push every so many rounds; 0: at the end only")
    private: bool = Field(True, description="make the repository private when it is created")
    tag: str | None = Field(None, description="tag of the last push")


class OutputConfig(Settings):
    """Where a run leaves its files."""

    dir: str = Field("runs", description="holds <name>/ and, apart from it, <name>.private/")
    checkpoint_every: PositiveCount | None = Field(
        None, description="rounds between commits; None: a sixth of the rounds, at most 50"
    )
