"""Settings of the update stages in `protocol.stages`."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from pfm_llm.config.model import Settings


class ClipConfig(Settings):
    """Scale down an update whose norm exceeds a bound."""

    norm: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="largest Euclidean norm of an update, over all its tensors",
    )


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
