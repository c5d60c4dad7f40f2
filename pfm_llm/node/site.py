"""``site.yaml``: what the owner of a node decides. Everything else the server decides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pfm_llm.base.errors import ConfigError, NodeRefused
from pfm_llm.config.choices import Dtype, HeldOutSplit
from pfm_llm.config.data import DataConfig
from pfm_llm.config.model import BACKBONE_ENCODER, PositiveCount, Settings
from pfm_llm.config.running import CacheConfig
from pfm_llm.config.schema import ExperimentConfig, parse_config, read_yaml
from pfm_llm.config.settings import are_of_server, settings_hash
from pfm_llm.config.text import validated
from pfm_llm.protocol.messages import MOST_NODES
from pfm_llm.protocol.refusals import NodeRefusal

NodeName = Annotated[str, Field(min_length=1, max_length=100)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""An Ed25519 key in hexadecimal."""
FEWEST_USERS_OF_FIGURE = 20
_OWN_DATA = {"source", "items", "hub", "columns", "reading", "day_first", "max_users"} | {
    "max_bad_rows"
}


class AllowConfig(Settings):
    """What a server may ask of the node. A request for anything else is refused."""

    backbones: tuple[str, ...] = Field(
        ("smollm2-135m",), description="language models that may be loaded"
    )
    encoders: tuple[str, ...] = Field(
        (BACKBONE_ENCODER, "minilm"), description="encoders of items that may be loaded"
    )
    prompts: tuple[str, ...] = Field((), description="prompts; none: all that pfm_llm ships")
    settings: tuple[str, ...] = Field(
        (),
        description="hashes of settings to accept, as `pfm node about` shows them; none: any",
    )
    single_updates: bool = Field(
        False, description="whether the update of one client may leave, for research"
    )
    evaluation: tuple[HeldOutSplit, ...] = Field(
        (HeldOutSplit.VALIDATION, HeldOutSplit.TEST), description="splits that may be measured"
    )


class SocketConfig(Settings):
    """The socket that the engine's process speaks to."""

    path: str | None = Field(None, description="None: socket/node.sock in the folder")
    group: str | None = Field(
        None,
        description="a group of the system whose members may connect; None: the owner alone",
    )


class MasksConfig(Settings):
    """Who the node is in rounds under masks, and whom it knows."""

    name: NodeName = Field(description="the node's name, as the server and the other nodes know it")
    peers: dict[NodeName, PublicKey] = Field(
        {},
        max_length=MOST_NODES,
        description="name of each other node to its key, as its owner has told; `pfm node about` "
        "prints a node's own",
    )
    required: bool = Field(True, description="whether a sum in the clear is refused")

    @model_validator(mode="after")
    def _are_others(self) -> Self:
        if self.name in self.peers:
            raise ValueError(f"masks.peers holds {self.name}, which is this node; leave it out")
        if len(set(self.peers.values())) < len(self.peers):
            raise ValueError("masks.peers: two nodes have one key; ask their owners for theirs")
        return self

    @property
    def keys(self) -> dict[str, bytes]:
        """Name of each peer to its key, 32 bytes."""
        return {name: bytes.fromhex(key) for name, key in self.peers.items()}


class SiteConfig(Settings):
    """A node."""

    data: DataConfig = Field(
        description="source, items, columns and what else tells how the node's files are read"
    )
    folder: str = Field(description="the node's private folder: private parts, slots, caches")
    socket: SocketConfig = SocketConfig()
    allow: AllowConfig = AllowConfig()
    masks: MasksConfig | None = Field(
        None, description="rounds under masks with other nodes; None: this node takes part in none"
    )
    min_users_per_sum: PositiveCount = Field(
        5, description="users in a sum of updates; a sum over fewer is refused"
    )
    min_users_per_figure: int = Field(
        FEWEST_USERS_OF_FIGURE,
        ge=FEWEST_USERS_OF_FIGURE,
        description="users of the node behind a figure or count; over fewer it is withheld",
    )
    max_evaluated_users: PositiveCount | None = Field(
        None, description="a fixed random sample of users that are measured; None: all"
    )
    max_message_mb: PositiveCount = Field(256, description="bound on a message, in MB")
    dtype: Dtype = Dtype.AUTO
    threads: PositiveCount | None = Field(None, description="None: all cores")
    tokens_per_chunk: PositiveCount = Field(2048, description="tokens of one many-clients pass")
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _only_own_data(self) -> Self:
        given = self.data.model_fields_set
        if "source" not in given:
            raise ValueError("data.source is missing; name the file of the node's interactions")
        if others := sorted(given - _OWN_DATA):
            raise ValueError(
                f"data.{others[0]} is the server's to decide, so that all nodes do the same; leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _group_reaches_the_socket(self) -> Self:
        if self.socket.group is not None and self.socket_path.is_relative_to(self.root):
            raise ValueError(
                "socket.group cannot enter the private folder; set socket.path outside of folder"
            )
        return self

    @property
    def root(self) -> Path:
        """The private folder, absolute."""
        return Path(self.folder).expanduser().absolute()

    @property
    def socket_path(self) -> Path:
        """The socket, absolute."""
        if self.socket.path is None:
            return self.root / "socket" / "node.sock"
        return Path(self.socket.path).expanduser().absolute()

    @property
    def max_message_bytes(self) -> int:
        """Bound on a message."""
        return self.max_message_mb * 10**6


def load_site(path: str | Path) -> SiteConfig:
    """Read a ``site.yaml``. Paths of data, folder and socket are looked for beside it.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong.
    """
    tree = read_yaml(path)
    here = Path(path).absolute().parent
    if isinstance(folder := tree.get("folder"), str):
        tree["folder"] = str(here / Path(folder).expanduser())
    if isinstance(socket := tree.get("socket"), dict) and isinstance(socket.get("path"), str):
        tree["socket"] = {**socket, "path": str(here / Path(socket["path"]).expanduser())}
    return validated(tree, SiteConfig, str(path))


def node_config(site: SiteConfig, settings: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment at a node: the server's settings and the site's.

    Args:
        site: The node's own.
        settings: What the server sent.

    Raises:
        NodeRefused: The server sent settings that are not its own, or are wrong, or that the owner
            does not allow.
    """
    if not are_of_server(settings):
        raise NodeRefused(NodeRefusal.MALFORMED, "the server sent settings that are the node's")
    own = site.data.model_dump(mode="json", include=site.data.model_fields_set)
    tree = {
        **settings,
        "data": {**settings.get("data", {}), **own},
        "backbone": {**settings.get("backbone", {}), "dtype": site.dtype.value},
        "cache": site.cache.model_dump(mode="json"),
        "runtime": {"threads": site.threads, "tokens_per_chunk": site.tokens_per_chunk},
        "output": {"dir": str(site.root)},
    }
    try:
        config = parse_config(tree, "the server's settings")
    except ConfigError as error:
        raise NodeRefused(NodeRefusal.MALFORMED, str(error)) from error
    _check_allowed(site.allow, config)
    return config


def _check_allowed(allow: AllowConfig, config: ExperimentConfig) -> None:
    hashed = settings_hash(config)
    # A prompt may also be a path, which a server must not choose.
    is_shipped = not config.prompt.endswith(".toml") and "/" not in config.prompt
    prompt_is_allowed = config.prompt in allow.prompts if allow.prompts else is_shipped
    for name, value, allowed in (
        ("backbones", config.backbone.name, config.backbone.name in allow.backbones),
        ("encoders", config.items.encoder, config.items.encoder in allow.encoders),
        ("prompts", config.prompt, prompt_is_allowed),
        ("settings", hashed, not allow.settings or hashed in allow.settings),
    ):
        if not allowed:
            raise NodeRefused(NodeRefusal.NOT_ALLOWED, f"allow.{name} does not hold {value!r}")
