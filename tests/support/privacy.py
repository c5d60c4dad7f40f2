"""Federations under differential privacy, and an account that needs no library."""

from typing import Any

import pytest

from pfm_llm.config.schema import FederationConfig
from pfm_llm.server.privacy import mechanism
from pfm_llm.server.privacy.mechanism import Spent

SPENT = Spent(
    epsilon=7.95,
    delta=1e-5,
    noise_multiplier=1.2007,
    clip_norm=0.5,
    participation="passes",
    cohort_size=64,
    num_clients=943,
    releases=80,
    planned_rounds=80,
    budget=8.0,
    accountant="dp-accounting 0.6.0, PLD",
)


def private_settings(norm: float = 1.0, **privacy: Any) -> dict[str, Any]:
    """Settings of a federation with noise, as many times ``norm`` as ``noise_multiplier`` says."""
    noise = {} if "epsilon" in privacy else {"noise_multiplier": 1.0}
    return {"stages": [{"clip": {"norm": norm}}], "privacy": {"delta": 1e-5, **noise, **privacy}}


def private_federation(norm: float = 1.0, cohort_size: int = 4, **privacy: Any) -> FederationConfig:
    """A settled federation of 100 rounds; see `private_settings`."""
    tree = {
        "num_rounds": 100,
        "cohort_size": cohort_size,
        "server": {"optimizer": "average", "lr_scale": 1.0, "warmup_rounds": 0},
    }
    return FederationConfig.model_validate(tree | private_settings(norm, **privacy))


def count_in_place_of_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ε be the number of composed releases, so that no library is needed."""

    def epsilon(noise_multiplier: float, count: int, rate: float | None, delta: float) -> float:
        return float(count)

    def most(epsilon: float, noise_multiplier: float, rate: float | None, delta: float) -> int:
        return int(epsilon)

    def noise(epsilon: float, count: int, rate: float | None, delta: float) -> float:
        return count / epsilon

    monkeypatch.setattr(mechanism, "epsilon_of", epsilon)
    monkeypatch.setattr(mechanism, "noise_multiplier_for", noise)
    monkeypatch.setattr(mechanism, "most_within", most)
    monkeypatch.setattr(mechanism, "accountant_name", lambda: "a count")
