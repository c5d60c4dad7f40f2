"""Settings of what updates pass on their way: the stages in `protocol.stages`, masks, noise."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from pfm_llm.config.choices import Aggregation, Participation, SplitKind, Transport, Weighting
from pfm_llm.config.methods import SPECS
from pfm_llm.config.model import Positive, PositiveCount, Settings

FEWEST_MASKED = 3
"""Parties of a round under masks: in a sum of two, each reads the other's update."""
_LARGEST_SUM = 2**31 - 1
_COARSEST = 1e-4
"""The largest rounding under masks: `head.item_met`, the finest tensor, has steps of 1e-3."""
_SHORTEST = 1e-20
_POISSON = Participation.POISSON


class ClipConfig(Settings):
    """Scale down an update whose norm exceeds a bound."""

    norm: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="largest Euclidean norm of an update, over all its tensors",
    )


class MasksConfig(Settings):
    """Pairwise masks, under which the server learns the sum of a cohort's updates alone."""

    neighbours: int | None = Field(
        None,
        ge=8,
        le=_LARGEST_SUM,
        description="other clients with which a client masks; None: 10, and more in cohorts "
        "beyond 64. See pfm_llm/protocol/masks/neighbours.py",
    )
    max_examples: PositiveCount = Field(
        10_000, description="an update counts for at most so many examples"
    )


def _switched(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


Masks = Annotated[MasksConfig | None, BeforeValidator(_switched)]
"""The settings, true for the defaults, or false."""


class PrivacyConfig(Settings):
    """Differential privacy of users, by noise on the sum of a round; see `server.privacy`."""

    epsilon: Positive | None = Field(
        None, description="ε of the whole run: the noise follows from it, and it is the budget"
    )
    noise_multiplier: Positive | None = Field(
        None, description="in place of epsilon: standard deviation of the noise, over clip's norm"
    )
    max_epsilon: Positive | None = Field(
        None, description="with noise_multiplier: the run ends before the round that exceeds it"
    )
    delta: float = Field(gt=0, lt=1, description="δ of the whole run, below 1 over the users")
    participation: Participation = Field(
        Participation.PASSES,
        description="passes: each user equally often; poisson: each by a secret draw in each round",
    )

    @model_validator(mode="after")
    def _has_one_noise(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("set one of epsilon and noise_multiplier; the noise follows from it")
        if self.epsilon is not None and self.max_epsilon is not None:
            raise ValueError("epsilon is the budget already; leave max_epsilon out")
        return self

    @property
    def budget(self) -> float | None:
        """The largest ε that the run may reach; None: there is no bound."""
        return self.max_epsilon if self.epsilon is None else self.epsilon


class StageConfig(Settings):
    """One entry of ``federation.stages``: exactly one of these keys, with its settings."""

    clip: ClipConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, entry: Any) -> Any:
        known = ", ".join(cls.model_fields)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"a stage is written as its name and its settings, such as "
                f"{{clip: {{norm: 1.0}}}}, not as {entry!r}; known stages: {known}"
            )
        unknown = [name for name in entry if name not in cls.model_fields]
        if unknown:
            raise ValueError(f"unknown stage {unknown[0]!r}; known stages: {known}")
        named = [name for name, settings in entry.items() if settings is not None]
        if len(named) != 1:
            raise ValueError(
                f"an entry must hold one stage with its settings, this one holds {len(named)}; "
                f"known stages: {known}"
            )
        return entry

    @property
    def choice(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the stage."""
        [name] = [name for name in type(self).model_fields if getattr(self, name) is not None]
        return name, getattr(self, name).model_dump()


def aggregation_problem(federation: Any) -> str | None:
    """What keeps the updates of a `FederationConfig` from being aggregated, or None."""
    server = federation.server
    if server.aggregator is not Aggregation.MEAN and server.weighting is not Weighting.UNIFORM:
        return (
            f"federation.server.aggregator: {server.aggregator} counts every client once; set "
            "federation.server.weighting: uniform"
        )
    names = [stage.choice[0] for stage in federation.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"federation.stages: {twice[0]} is listed more than once" if twice else None


def masks_problem(federation: Any) -> str | None:
    """What keeps the updates of a `FederationConfig` from being masked, or None."""
    aggregator, cohort_size = federation.server.aggregator, federation.cohort_size
    if aggregator is not Aggregation.MEAN:
        return (
            f"masks show the server a sum alone, and the {aggregator} needs single updates; set "
            "federation.server.aggregator: mean, or leave federation.masks out"
        )
    if federation.transport is not Transport.FLOAT32:
        return "masks need words of 32 bits; set federation.transport: float32"
    if cohort_size is not None and cohort_size < FEWEST_MASKED:
        return (
            f"masks need at least {FEWEST_MASKED} clients in a cohort: in a sum of two each reads "
            "the other's update; raise federation.cohort_size"
        )
    if 3 * federation.simulated_dropouts > 1:
        return "masks come off where at most a third drops out; lower simulated_dropouts"
    most = _LARGEST_SUM // (cohort_size or 1)
    if federation.masks.max_examples > most:
        return f"the sum of examples would overflow; set masks.max_examples to at most {most}"
    norms = [stage.clip.norm for stage in federation.stages if stage.clip is not None]
    if not norms:
        return (
            "masks count in steps that follow from a bound of each update; add a stage to "
            "federation.stages, such as {clip: {norm: 1.0}}"
        )
    step = norms[0] * (cohort_size or 1) / _LARGEST_SUM
    if step > _COARSEST or norms[0] < _SHORTEST:
        return (
            f"masks round to steps of about {step:.2g} with federation.stages clip norm "
            f"{norms[0]:g}; set a norm near the median norm of the updates"
        )
    return None


def privacy_problem(config: Any) -> str | None:
    """What keeps an `ExperimentConfig` from being differentially private, or None."""
    federation, data = config.federation, config.data
    if federation.privacy is None:
        return None
    stages, is_poisson = federation.stages, federation.privacy.participation is _POISSON
    problems = {
        "protects a user, and here a client has several; set data.users_per_client: 1": (
            data.users_per_client > 1
        ),
        f"has nothing to protect with method: {config.method}, which sends no update; leave it "
        "out": SPECS[config.method].shares_nothing,
        "bounds what a user adds to a sum; set federation.server.aggregator: mean": (
            federation.server.aggregator is not Aggregation.MEAN
        ),
        "counts every user once; set federation.server.weighting: uniform": (
            federation.server.weighting is not Weighting.UNIFORM
        ),
        "needs sums that are exact; set federation.transport: float32": (
            federation.transport is not Transport.FLOAT32
        ),
        "needs updates of bounded length; end federation.stages with a clip, such as "
        "[{clip: {norm: 1.0}}]": not stages or stages[-1].clip is None,
        "with participation: poisson has cohorts of no fixed size, which masks need; set "
        "participation: passes, or leave federation.masks out": (
            is_poisson and federation.masks is not None
        ),
        "makes head.item_met noise, so that it no longer says what somebody has met; set "
        "head.item_met: false": config.head.item_met,
        "would not cover a weight chosen on users' events; leave evaluation.private_weights "
        "empty and set adapters.private.weight": bool(config.evaluation.private_weights),
        "needs what a user trains on to follow from that user alone; set data.split: "
        "leave_last_out or last_fraction": data.split is SplitKind.GLOBAL_TEMPORAL,
        "needs a catalogue that follows from no user; set data.met_items_only: false": (
            data.met_items_only
        ),
    }
    found = next((text for text, is_met in problems.items() if is_met), None)
    return found and f"federation.privacy {found}"
