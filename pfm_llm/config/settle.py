"""The values of settings that follow from the number of clients."""

from fractions import Fraction
from typing import Any

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.text import find_setting, set_setting, validated

FOLLOWING = (
    "federation.cohort_size",
    "federation.num_rounds",
    "federation.server.warmup_rounds",
    "evaluation.every",
    "output.checkpoint_every",
)
"""Dotted keys of the settings that are None until `settle` gives them a value."""

_COHORT_SIZE = 8
_ROUNDS_STEP = 10
_MOST_WARMUP_ROUNDS, _MOST_BETWEEN_VALIDATIONS, _MOST_BETWEEN_COMMITS = 10, 100, 50


def settle(config: ExperimentConfig, num_clients: int) -> ExperimentConfig:
    """Give a value to every setting that follows from the number of clients.

    With n clients, R rounds of c clients and p passes over the clients::

        c = min(8, n),    R = max(10, p n / c, rounded down to tens)
        warm-up = min(10, R / 10),    validations every min(100, R / 4) rounds
        commits every k rounds, k the largest number up to min(50, R / 6) that divides
        push_to_hub.every

    All are rounded down, the last two are at least 1. A value in the config is kept, and the others
    follow from it.

    Args:
        config: The experiment; a settled config is returned unchanged.
        num_clients: Number of clients with at least one training example.

    Raises:
        DataError: The number is 0.
        ConfigError: The values contradict each other.
    """
    if num_clients < 1:
        raise DataError(
            "no user has two events to train on; give longer histories, or hold out less "
            "(data.split, data.held_out)"
        )
    federation, push = config.federation, config.push_to_hub
    cohort = federation.cohort_size or min(_COHORT_SIZE, num_clients)
    rounds = federation.num_rounds or _num_rounds(federation.passes, num_clients, cohort)
    commits = max(1, min(_MOST_BETWEEN_COMMITS, rounds // 6))
    if push is not None and push.every:
        commits = max(k for k in range(1, commits + 1) if push.every % k == 0)
    values: dict[str, int] = {
        "federation.cohort_size": cohort,
        "federation.num_rounds": rounds,
        "federation.server.warmup_rounds": min(_MOST_WARMUP_ROUNDS, rounds // 10),
        "evaluation.every": max(1, min(_MOST_BETWEEN_VALIDATIONS, rounds // 4)),
        "output.checkpoint_every": commits,
    }
    return _filled(config, values)


def settle_like(config: ExperimentConfig, settled: ExperimentConfig) -> ExperimentConfig:
    """Like `settle`, with the values of a settled config."""
    tree = settled.model_dump(mode="json")
    return _filled(config, {key: find_setting(tree, key) for key in FOLLOWING})


def known(value: int | None) -> int:
    """The value of one of `FOLLOWING`, of a settled config.

    Raises:
        ConfigError: The config is not settled.
    """
    if value is None:
        raise ConfigError(
            f"one of {', '.join(FOLLOWING)} has no value yet; pass the config through "
            "config.settle.settle, or set it"
        )
    return value


def _num_rounds(passes: float, num_clients: int, cohort_size: int) -> int:
    # The decimal number: the binary float 3.4 is not exactly 34 / 10, which may change a floor.
    exact = Fraction(str(passes)) * num_clients / cohort_size
    return max(_ROUNDS_STEP, int(exact / _ROUNDS_STEP) * _ROUNDS_STEP)


def _filled(config: ExperimentConfig, values: dict[str, Any]) -> ExperimentConfig:
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        if find_setting(tree, key) is None:
            set_setting(tree, key, value)
    return validated(tree, ExperimentConfig, config.name)
