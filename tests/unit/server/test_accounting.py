"""ε: what the library says, beside a formula that is known for it."""

import builtins
import math
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from pfm_llm.base.errors import ConfigError
from pfm_llm.server.privacy.accounting import (
    accountant_name,
    epsilon_of,
    most_within,
    noise_multiplier_for,
)

DELTA = 1e-5


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("dp_accounting", reason="needs the extra [dp]")


def closed_form(noise_multiplier: float, count: int) -> float:
    """ε of composed Gaussian mechanisms: Balle and Wang 2018, arXiv 1805.06530, theorem 8."""
    size = math.sqrt(count) / noise_multiplier

    def delta_of(epsilon: float) -> float:
        low = norm.cdf(size / 2 - epsilon / size)
        return float(low - math.exp(epsilon) * norm.cdf(-size / 2 - epsilon / size))

    return float(brentq(lambda epsilon: delta_of(epsilon) - DELTA, 0.0, 100.0, xtol=1e-12))


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (1.0, 4), (2.5, 7)])
def test_passes_cost_what_theory_says_of_gaussian_mechanisms(
    library: Any, noise: float, count: int
) -> None:
    found, exact = epsilon_of(noise, count, None, DELTA), closed_form(noise, count)
    assert exact <= found <= exact + 1e-3


def test_a_poisson_sample_costs_what_the_library_says_itself(library: Any) -> None:
    from dp_accounting import pld

    rate, count = 64 / 943, 100
    accountant = pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for _ in range(count):
        accountant.compose(library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(1.0)))
    found = epsilon_of(1.0, count, rate, DELTA)
    # Added up one by one the library rounds up each time.
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)
    assert found < epsilon_of(1.0, count, None, DELTA) / 5


def test_nothing_costs_nothing() -> None:
    assert epsilon_of(1.0, 0, None, DELTA) == 0.0


def test_noise_that_follows_from_epsilon_is_enough_and_hardly_more(library: Any) -> None:
    noise = noise_multiplier_for(8.0, 4, None, DELTA)
    assert 7.9 < epsilon_of(noise, 4, None, DELTA) <= 8.0


def test_the_most_releases_within_a_budget(library: Any) -> None:
    most = most_within(8.0, 1.0, None, DELTA)
    assert epsilon_of(1.0, most, None, DELTA) <= 8.0 < epsilon_of(1.0, most + 1, None, DELTA)
    assert most_within(1e-3, 1.0, None, DELTA) == 0


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install -c constraints-dp\.txt 'pfm-llm\[dp\]'"):
        accountant_name()
    with pytest.raises(ConfigError, match="dp-accounting, which is not installed"):
        epsilon_of(3.25, 1, None, DELTA)
