"""The config schema. Unknown keys and impossible combinations of values are errors."""

import hashlib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import (
    Ablation,
    Aggregation,
    Dtype,
    LearningRateSchedule,
    LocalOptimizer,
    Regime,
    Schedule,
    ServerOptimizer,
    SplitKind,
    Task,
    Transport,
    Weighting,
)
from pfm_llm.config.data import RECOGNISED, DataConfig, beside
from pfm_llm.config.methods import SPECS, Method, with_method
from pfm_llm.config.model import (
    AdaptersConfig,
    Count,
    Fraction,
    HeadConfig,
    ItemsConfig,
    NonNegative,
    Positive,
    PositiveCount,
    Settings,
    WindowConfig,
)
from pfm_llm.config.private_kinds import PRIVATE_KINDS
from pfm_llm.config.running import (
    CacheConfig,
    EvaluationConfig,
    InitFromConfig,
    OutputConfig,
    PushToHubConfig,
    RuntimeConfig,
)
from pfm_llm.config.stages import (
    Masks,
    PrivacyConfig,
    StageConfig,
    aggregation_problem,
    masks_problem,
    privacy_problem,
)
from pfm_llm.config.text import apply_override, validated

_FEDAVG_STEPS = 4
"""Minimum local steps of fedavg: with fewer, the local models hardly differ."""
_TRIM_SHARE = 0.2


class BackboneConfig(Settings):
    """The frozen language model."""

    name: str = Field("smollm2-135m", description="embedded name, Hub id or local folder")
    revision: str | None = Field(None, description="Hub revision")
    dtype: Dtype = Dtype.AUTO


class LocalConfig(Settings):
    """The local training of a client in a round."""

    schedule: Schedule = Schedule.JOINT
    shared_local_steps: PositiveCount = 1
    private_local_steps: Count = 1
    personalise_steps: Count = Field(4, description="private steps before an evaluation")
    windows_per_step: PositiveCount | None = Field(
        None,
        description="windows that a step reads, in turn; None: all, of a user at most 64",
    )
    personalise_windows: PositiveCount | None = Field(
        1, description="windows_per_step of the steps before an evaluation"
    )
    shared_optimizer: LocalOptimizer = LocalOptimizer.SGD
    shared_lr: Positive = Field(1.0, description="no effect with sgd, one step and fedadam")
    private_optimizer: LocalOptimizer = LocalOptimizer.ADAMW
    private_lr: Positive = 2e-4
    max_grad_norm: Positive | None = Field(None, description="bound of a client's gradient")
    unseen_only: bool = Field(True, description="items of the history are no negatives")
    horizon: PositiveCount = Field(
        30, description="items after a position that it predicts; the k-th counts 1 / k"
    )


class ServerConfig(Settings):
    """The server's optimizer. Each group of tensors has a learning rate."""

    optimizer: ServerOptimizer = ServerOptimizer.FEDADAM
    weighting: Weighting = Weighting.UNIFORM
    aggregator: Aggregation = Field(
        Aggregation.MEAN,
        description="median and trimmed_mean are of each number on its own; foolsgold counts "
        "updates less that are alike",
    )
    # Not dumped at its default: hashes of earlier settings stay as they are.
    trim_share: float = Field(
        _TRIM_SHARE,
        ge=0,
        lt=0.5,
        description="share that a trimmed_mean leaves out at each end",
        exclude_if=lambda value: value == _TRIM_SHARE,
    )
    lr_lora: Positive = 1e-3
    lr_head: Positive = 3e-3
    lr_item_ids: Positive = 3e-2
    lr_item_bias: Positive = 3e-2
    lr_scale: Positive = Field(
        1.5, description="factor on these, and on an average; not on the basis of taste vectors"
    )
    lr_schedule: LearningRateSchedule = LearningRateSchedule.COSINE
    warmup_rounds: Count | None = Field(None, description="None: a tenth of the rounds, at most 10")
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.0


class FederationConfig(Settings):
    """Rounds, cohorts, local training and the server."""

    passes: Positive = Field(
        3.4, description="mean participations of a client; num_rounds overrides it"
    )
    num_rounds: PositiveCount | None = Field(
        None, description="None: follows from passes, cohort_size and the number of clients"
    )
    cohort_size: PositiveCount | None = Field(
        None, description="clients in a round; None: 8, or all where there are fewer"
    )
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    # Not dumped at its default: hashes of earlier settings stay as they are.
    transport: Transport = Field(
        Transport.FLOAT32,
        description="numbers of a message, in both directions; the server computes in float32",
        exclude_if=lambda value: value is Transport.FLOAT32,
    )
    stages: tuple[StageConfig, ...] = Field(
        (), description="stages that each update passes, in order, such as [{clip: {norm: 1.0}}]"
    )
    masks: Masks = Field(
        None,
        description="mask updates, so that the server learns their sum alone; true: with defaults",
        exclude_if=lambda value: value is None,
    )
    privacy: PrivacyConfig | None = Field(
        None,
        description="differential privacy of users, accounted for the whole run",
        exclude_if=lambda value: value is None,
    )
    simulated_dropouts: Fraction = Field(
        0.0,
        description="share of each cohort that does not answer, in a simulation",
        exclude_if=lambda value: not value,
    )

    @model_validator(mode="after")
    def _can_be_masked(self) -> "FederationConfig":
        if self.masks is not None and (problem := masks_problem(self)):
            raise ValueError(problem)
        return self


class ExperimentConfig(Settings):
    """All settings of a run.

    The defaults are tuned on MovieLens-100K. `settle.settle` gives a value to each setting that is
    None and follows from the number of clients.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    prompt: str = "next_item.v2"
    method: Method = Field(Method.PFM, description="see config/methods; custom fixes nothing")
    regime: Regime | None = Field(None, description="a label that the settings must fit")
    tasks: tuple[Task, ...] = Field(
        (Task.NEXT_ITEM,), description="next_item, or next_item and like"
    )
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    items: ItemsConfig = ItemsConfig()
    # Not dumped at its default: hashes of earlier settings stay as they are.
    ablation: Ablation = Field(
        Ablation.NONE,
        description="what to do without, to measure what it is worth; see model/ablation.py",
        exclude_if=lambda value: value is Ablation.NONE,
    )
    window: WindowConfig = WindowConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    head: HeadConfig = HeadConfig()
    federation: FederationConfig = FederationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cache: CacheConfig = CacheConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()
    init_from: InitFromConfig | None = None
    push_to_hub: PushToHubConfig | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> "ExperimentConfig":
        for problem in (
            _private_problem(self),
            _task_problem(self),
            _regime_problem(self),
            aggregation_problem(self.federation),
            _work_problem(self),
            privacy_problem(self),
            _output_problem(self),
        ):
            if problem is not None:
                raise ValueError(problem)
        return self


def _private_problem(config: ExperimentConfig) -> str | None:
    private, local = config.adapters.private, config.federation.local
    if not private.enabled:
        return None
    spec, kind = PRIVATE_KINDS[private.kind], f"adapters.private.kind: {private.kind}"
    if spec.one_user and config.data.users_per_client > 1:
        return (
            f"{kind} reads one user's history in order; set data.users_per_client: 1, or set "
            "method: custom and another kind"
        )
    if spec.schedule not in (None, local.schedule):
        return f"{kind} needs federation.local.schedule: {spec.schedule}"
    if local.private_local_steps < spec.min_steps:
        return f"{kind} needs private_local_steps of at least {spec.min_steps}"
    for name, value in spec.fixed.items():
        if getattr(private, name) != value:
            return f"adapters.private.{name} has no effect with {kind}; leave it out"
    if not private.on_layers and not private.head_rank:
        return "adapters.private: on_layers: false with head_rank: 0 leaves nothing private"
    return None


def _task_problem(config: ExperimentConfig) -> str | None:
    if Task.NEXT_ITEM not in config.tasks or len(set(config.tasks)) != len(config.tasks):
        return "tasks must hold next_item, and like at most once beside it"
    if Task.LIKE in config.tasks and config.data.split is SplitKind.LEAVE_LAST_OUT:
        return (
            "tasks: like needs data.split: last_fraction or global_temporal, because one held-out "
            "event of a user gives no AUC"
        )
    return None


def _regime_problem(config: ExperimentConfig) -> str | None:
    local, optimizer = config.federation.local, config.federation.server.optimizer
    if config.regime is Regime.FEDSGD and (
        local.shared_local_steps != 1
        or local.shared_optimizer is not LocalOptimizer.SGD
        or optimizer is not ServerOptimizer.FEDADAM
    ):
        return (
            "regime: fedsgd is one local gradient and an optimizer at the server; set "
            "federation.local.shared_local_steps: 1, shared_optimizer: sgd and "
            "federation.server.optimizer: fedadam"
        )
    if config.regime is Regime.FEDAVG and (
        local.shared_local_steps < _FEDAVG_STEPS or optimizer is ServerOptimizer.FEDADAM
    ):
        return (
            f"regime: fedavg needs federation.local.shared_local_steps of at least {_FEDAVG_STEPS} "
            "and federation.server.optimizer: average or fedavgm"
        )
    return None


def _work_problem(config: ExperimentConfig) -> str | None:
    local = config.federation.local
    if SPECS[config.method].shares_nothing and config.federation.masks is not None:
        return f"method: {config.method} sends no update to mask; leave federation.masks out"
    if SPECS[config.method].shares_nothing and (
        config.regime is Regime.FEDAVG or local.shared_local_steps > local.private_local_steps
    ):
        return (
            f"method: {config.method} trains no shared tensor, so shared steps have no effect; "
            "remove regime: fedavg and federation.local.shared_local_steps, and set the steps of a "
            "round with private_local_steps (at least 1)"
        )
    return None


def _output_problem(config: ExperimentConfig) -> str | None:
    push, commits = config.push_to_hub, config.output.checkpoint_every
    if push is not None and commits is not None and push.every % commits:
        return (
            f"push_to_hub.every: {push.every} is not a multiple of output.checkpoint_every "
            f"({commits}), but only committed rounds are pushed; change one of them"
        )
    if config.name.endswith(".private"):
        return "name ends in .private, which is reserved for private folders; choose another name"
    return None


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML config.

    Args:
        path: The file.
        overrides: ``dotted.key=value`` strings, values in YAML, applied on top.

    Raises:
        ConfigError: The file cannot be read, or a key or value is wrong; the message names the
            key, and for an unknown one the nearest valid key.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, origin=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, without defaults; ``data: PATH`` is expanded.

    A path of data that is there beside the file is that one, and else one from the working folder.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    tree = _with_source(tree)
    if isinstance(data := tree.get("data"), dict):
        tree["data"] = {key: beside(Path(path).parent, key, data[key]) for key in data}
    return tree


def _with_source(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree in which ``data: PATH`` is ``data: {source: PATH}``."""
    data = tree.get("data")
    return {**tree, "data": {"source": data}} if isinstance(data, str) else tree


def parse_config(tree: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validate a tree of settings; see `load_config`."""
    return validated(with_method(_with_source(tree), origin), ExperimentConfig, origin)


def dump_config(config: ExperimentConfig) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def training_hash(config: ExperimentConfig) -> str:
    """SHA-256, in hex, over all settings that the trained tensors depend on."""
    sections = ("name", "evaluation", "cache", "runtime", "output", "push_to_hub")
    elsewhere: dict[str, Any] = dict.fromkeys(sections, True)
    private = config.adapters.private
    # `weight` acts at serving time. A kind reads its own settings alone; a private part that is
    # disabled reads none.
    kinds = {*PRIVATE_KINDS} - {private.kind, *PRIVATE_KINDS[private.kind].reads}
    unread = {*kinds, "weight"} if private.enabled else {*type(private).model_fields} - {"enabled"}
    # A rating that is recognised was null when the first hashes were made.
    columns = config.data.columns
    if columns.rating == RECOGNISED:
        data = {"columns": columns.model_copy(update={"rating": None})}
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    # The data have a hash of their own, so a run goes on after the commit of its data was named.
    elsewhere["data"] = {"hub": {"revision": True, "items": {"revision"}}}
    elsewhere["adapters"] = {"private": dict.fromkeys(unread, True)}
    # Hashes that were made before it was there stay as they are while it is off.
    if not config.head.item_dropout:
        elsewhere["head"] = {"item_dropout": True}
    unused = {"passes": True} if config.federation.num_rounds is not None else {}
    # A larger budget lets a run go on, and changes no round.
    budget = {"privacy": {"max_epsilon": True}} if config.federation.privacy else {}
    if unused or budget:
        elsewhere["federation"] = {**unused, **budget}
    return hashlib.sha256(config.model_dump_json(exclude=elsewhere).encode()).hexdigest()
