"""Settings of what an update passes on its way: the stages in `protocol.stages`, and masks."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pfm_llm.config.choices import Aggregation, Transport
from pfm_llm.config.model import PositiveCount, Settings

FEWEST_MASKED = 3
"""Parties of a round under masks: in a sum of two, each reads the other's update."""
_LARGEST_SUM = 2**31 - 1
_COARSEST = 1e-4
"""The largest rounding under masks: `head.item_met`, the finest tensor, has steps of 1e-3."""
_SHORTEST = 1e-20


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


def stages_problem(stages: tuple[StageConfig, ...]) -> str | None:
    """The problem of the list as a whole, or None."""
    names = [stage.choice[0] for stage in stages]
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
