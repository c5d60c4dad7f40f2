"""The ways in which a federation can protect its updates, as settings of an experiment."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import Aggregation, Transport, Weighting
from pfm_llm.config.methods import SPECS
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.text import set_setting, validated

_DELTA = 1e-5
"""δ of a mode with noise; the noise is set by its multiplier, so that no figure depends on it."""


class AuditMode(StrEnum):
    """How updates are protected."""

    CLEAR = "clear"
    """Not at all: the default of a run."""
    CLIP = "clip"
    """Each update is clipped."""
    MASKS = "masks"
    """Clipped and masked."""
    NOISE = "noise"
    """Clipped, with noise on the sum of a round, as ``federation.privacy`` puts it there."""
    ALL = "all"
    """Clipped and masked, with noise on the sum: the default for a deployment."""

    @property
    def is_masked(self) -> bool:
        """Whether updates travel under masks."""
        return self in (AuditMode.MASKS, AuditMode.ALL)

    @property
    def is_noisy(self) -> bool:
        """Whether there is noise on the sum of a round."""
        return self in (AuditMode.NOISE, AuditMode.ALL)


@dataclass(frozen=True)
class Protection:
    """The strength of the protections.

    Attributes:
        norm: The bound C of ``clip``.
        noise_multiplier: Standard deviation of the noise on a sum, over C.
    """

    norm: float = 1.0
    noise_multiplier: float = 8.0


def check_auditable(config: ExperimentConfig) -> None:
    """Raise `ConfigError` where a client has no single history, or sends nothing."""
    if config.data.users_per_client > 1:
        raise ConfigError(
            "an audit reads the history of a user off its update, and here a client has several "
            "users; set data.users_per_client: 1"
        )
    if SPECS[config.method].shares_nothing:
        raise ConfigError(f"method: {config.method} sends no update, so there is nothing to audit")


def config_of(
    config: ExperimentConfig, mode: AuditMode, protection: Protection
) -> ExperimentConfig:
    """An experiment with the protections of a mode in place of its own.

    Args:
        config: The experiment, settled or not.
        mode: How updates are protected.
        protection: How strongly.

    Raises:
        ConfigError: The experiment cannot be protected like that; the message says what to set.
    """
    changes: dict[str, Any] = {
        "federation.stages": [],
        "federation.masks": None,
        "federation.privacy": None,
        "federation.server.aggregator": Aggregation.MEAN.value,
        "federation.transport": Transport.FLOAT32.value,
    }
    if mode is not AuditMode.CLEAR:
        changes["federation.stages"] = [{"clip": {"norm": protection.norm}}]
    if mode.is_masked:
        changes["federation.masks"] = True
    if mode.is_noisy:
        noise = {"noise_multiplier": protection.noise_multiplier, "delta": _DELTA}
        changes |= {
            "federation.privacy": noise,
            "federation.server.weighting": Weighting.UNIFORM.value,
            "head.item_met": False,
            "head.item_dropout": 0.0,
            "evaluation.private_weights": [],
        }
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        set_setting(tree, key, value)
    return validated(tree, ExperimentConfig, config.name)
