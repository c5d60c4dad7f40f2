"""ε of many releases under Gaussian noise, from the library `dp-accounting`.

It adds up privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al.
2022, arXiv 2207.04380), rounded so that ε is never too small. Two data sets are neighbours if one
has everything that the other has but what one user gives.
"""

import functools
import importlib.metadata
from types import ModuleType
from typing import Any

from pfm_llm.base.errors import ConfigError

_LIBRARY = "dp-accounting"


def accountant_name() -> str:
    """The library with its version, and its method.

    Raises:
        ConfigError: The library is not installed.
    """
    _library()
    return f"{_LIBRARY} {importlib.metadata.version(_LIBRARY)}, PLD"


@functools.lru_cache(maxsize=4096)
def epsilon_of(noise_multiplier: float, count: int, rate: float | None, delta: float) -> float:
    """ε of releases that each see what one user gives.

    Args:
        noise_multiplier: Standard deviation of the noise over the bound of what a user gives.
        count: Number of releases, at least 0.
        rate: The chance with which a user takes part in each of them, on its own and in secret;
            None: the user takes part in all.
        delta: δ.

    Raises:
        ConfigError: The library is not installed.
    """
    if not count:
        return 0.0
    accountant = _new_accountant()
    accountant.compose(_event(noise_multiplier, rate), count)
    return float(accountant.get_epsilon(delta))


def noise_multiplier_for(epsilon: float, count: int, rate: float | None, delta: float) -> float:
    """The noise with which so many releases stay within ε; see `epsilon_of`.

    Raises:
        ConfigError: The library is not installed, or no noise is enough.
    """
    library = _library()

    def whole(noise_multiplier: float) -> Any:
        return library.SelfComposedDpEvent(_event(noise_multiplier, rate), count)

    try:
        return float(library.calibrate_dp_mechanism(_new_accountant, whole, epsilon, delta))
    except ValueError as error:
        raise ConfigError(
            f"federation.privacy: no noise was found for epsilon {epsilon:g} and delta {delta:g} "
            f"({error}); raise one of them, or set noise_multiplier"
        ) from error


def most_within(epsilon: float, noise_multiplier: float, rate: float | None, delta: float) -> int:
    """The largest number of releases that stays within ε; see `epsilon_of`."""

    def is_within(count: int) -> bool:
        return epsilon_of(noise_multiplier, count, rate, delta) <= epsilon

    low, high = 0, 1
    while is_within(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low


def _event(noise_multiplier: float, rate: float | None) -> Any:
    library = _library()
    noisy = library.GaussianDpEvent(noise_multiplier)
    return noisy if rate is None else library.PoissonSampledDpEvent(rate, noisy)


def _new_accountant() -> Any:
    relation = _library().NeighboringRelation.ADD_OR_REMOVE_ONE
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(relation)


def _library() -> ModuleType:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError(
            f"federation.privacy needs {_LIBRARY}, which is not installed: "
            "pip install -c constraints-dp.txt 'pfm-llm[dp]'"
        ) from error
    return dp_accounting
