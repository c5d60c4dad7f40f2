"""Intervals over users and seeds, and tests of several differences at once.

A result file has the mean over users of each figure, with a percentile bootstrap interval over
users. Users and seeds are crossed: every seed is measured on the same users. With S seeds,

    V  = e² + s² / S        e: mean over seeds of the bootstrap's standard error,
                            s: standard deviation of the S means,
    df = V² (S - 1) / (s² / S)²

is the variance of the mean over seeds, with its degrees of freedom (Satterthwaite 1946, Biometrics
Bulletin 2(6)). V is too large rather than too small: e is exact only for seeds that are perfectly
correlated through their users, and what depends on user and seed together is in both terms. The
variance of the pigeonhole bootstrap, which resamples users and seeds, is too large for the same
reason (Owen 2007, Annals of Applied Statistics 1(2)). No user has to be found again in the file of
another seed, and the files name none. The standard error of a bootstrap is the width of its
interval over that of a standard normal distribution.

Nothing here imports torch.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special

from pfm_llm.base.errors import DataError

ROUNDING = 1e-9
"""Figures that differ by less count as equal: the order of summation changes them so much."""

_MOST_DF = 1e9  # as good as a normal distribution

FloatArray = npt.NDArray[np.float64]
_Key = TypeVar("_Key", bound=Hashable)


class Measured(Protocol):
    """A figure of one seed, such as a `ResultRow`."""

    @property
    def value(self) -> float:
        """The mean over users."""

    @property
    def ci_low(self) -> float:
        """Lower end of the interval over users."""

    @property
    def ci_high(self) -> float:
        """Upper end of it."""


@dataclass(frozen=True)
class Figure:
    """A figure over one or several seeds.

    Attributes:
        value: The mean over users, and over seeds.
        low: Lower end of the interval over users and seeds.
        high: Upper end of it.
        p_value: Two-sided, of a value of 0; for differences.
    """

    value: float
    low: float
    high: float
    p_value: float


def over_seeds(found: Sequence[Measured], confidence: float) -> Figure:
    """One figure of several seeds; the module has the formulas.

    The interval of one seed stays as it is. That of several keeps its skewness: each side is the
    mean over seeds, made wider by the ratio of the two half-widths. ``p_value`` compares the value
    with the square root of V, by the t distribution with df degrees of freedom; with one seed, by
    the normal distribution.

    Args:
        found: The figure of each seed.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        DataError: ``found`` is empty, or ``confidence`` is out of range.
    """
    if not found or not 0 < confidence < 1:
        raise DataError(
            f"an interval over {len(found)} seeds with coverage {confidence}: give one seed at "
            "least, and a coverage between 0 and 1"
        )
    if len(found) == 1:
        return _of_one(found[0], confidence)
    level = (1 + confidence) / 2
    normal = float(special.ndtri(level))
    values = [one.value for one in found]
    value = statistics.fmean(values)
    below = statistics.fmean(one.value - one.ci_low for one in found)
    above = statistics.fmean(one.ci_high - one.value for one in found)
    error = (below + above) / 2 / normal
    of_seeds = statistics.variance(values) / len(values)
    spread = math.hypot(error, math.sqrt(of_seeds))
    if of_seeds == 0:
        return Figure(value, value - below, value + above, _p_value(value, spread, _MOST_DF))
    ratio = min(spread**2 / of_seeds, _MOST_DF)  # before its square, where it may be huge
    df = min(ratio**2 * (len(values) - 1), _MOST_DF)
    half = spread * float(special.stdtrit(df, level))
    if error > 0:
        wider = half / (error * normal)
        below, above = below * wider, above * wider
    else:
        below = above = half
    return Figure(value, value - below, value + above, _p_value(value, spread, df))


def _of_one(found: Measured, confidence: float) -> Figure:
    width = 2 * float(special.ndtri((1 + confidence) / 2))
    p_value = _p_value(found.value, (found.ci_high - found.ci_low) / width, _MOST_DF)
    return Figure(found.value, found.ci_low, found.ci_high, p_value)


def settled(figures: Mapping[_Key, Figure], confidence: float) -> set[_Key]:
    """The differences that are not 0 after Holm's correction for the number of them.

    Args:
        figures: All differences that a table or a text claims.
        confidence: One less the probability of a single wrong claim among them, in (0, 1).
    """
    adjusted = holm(np.array([figure.p_value for figure in figures.values()], np.float64))
    return {key for key, p in zip(figures, adjusted.tolist(), strict=True) if p < 1 - confidence}


def holm(p_values: FloatArray) -> FloatArray:
    """Holm's step-down correction for several tests.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2), 1979: with p sorted ascending, the i-th of m becomes
    max over j <= i of min(1, (m - j + 1) p_j). It is valid for dependent tests, such as these: a
    user is in several of them.

    Args:
        p_values: float64 [m].

    Returns:
        float64 [m], in the order given.

    Raises:
        DataError: One is not in [0, 1].
    """
    p_values = np.asarray(p_values, np.float64)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise DataError("Holm's correction: a p-value is not between 0 and 1")
    order = np.argsort(p_values, kind="stable")
    remaining = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * remaining), 1.0)
    return adjusted


def _p_value(value: float, spread: float, df: float) -> float:
    if abs(value) <= ROUNDING:
        return 1.0
    return 2 * float(special.stdtr(df, -abs(value) / spread)) if spread > 0 else 0.0
