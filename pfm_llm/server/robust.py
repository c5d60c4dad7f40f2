"""Aggregators that meet hostile clients, and the choice among all aggregators.

A mean has no defence of its own. What is here needs to see single updates, so it works neither
under masks nor on the sums of nodes.
"""

import abc
import math
from collections.abc import Mapping
from typing import Self

import torch

from pfm_llm.config.choices import Aggregation
from pfm_llm.config.schema import ServerConfig
from pfm_llm.protocol.types import Tensors
from pfm_llm.server.aggregation import Aggregator, WeightedMean

_ROUNDING = 1e-9
"""A product of a share and a count that is this little above an integer counts as the integer."""


class Collection(Aggregator):
    """Keeps all updates of a round, 4 bytes per number and client; a mean keeps 8 per number.

    A weight is the client's own claim (its number of examples), so a client with a large claim
    would form a majority. Therefore weights have no effect, and config validation requires
    ``weighting: uniform``.
    """

    def _take(self, tensors: Tensors, weight: float) -> None:
        self._held.append({n: t.detach().to("cpu", copy=True) for n, t in tensors.items()})


class OrderStatistic(Collection):
    """Combines the values of each number on its own, from the smallest to the largest.

    If most clients do not change a number, the middle of its changes is 0. A table with a row per
    item therefore learns less about rare items than with the mean.
    """

    @abc.abstractmethod
    def _of_ordered(self, ordered: torch.Tensor) -> torch.Tensor:
        """The aggregate of a tensor, float64 of its shape.

        Args:
            ordered: [clients, ...], of each number the clients' values in ascending order.
        """

    def _combine(self) -> dict[str, torch.Tensor]:
        combined = {}
        for name in self._held[0]:
            ordered = torch.stack([held[name] for held in self._held]).sort(dim=0).values
            combined[name] = self._of_ordered(ordered).to(torch.float32)
        return combined


class CoordinateMedian(OrderStatistic):
    """The median over clients, of each number on its own.

        Δ̃[j] = median { Δ_u[j] : u in the cohort }   (Yin et al. 2018, arXiv 1803.01498, option I)

    For an even number of clients it is the mean of the two middle values, computed in float64. As
    long as fewer than half of the clients are hostile, each number stays within the range of the
    honest values.
    """

    def _of_ordered(self, ordered: torch.Tensor) -> torch.Tensor:
        count = len(ordered)
        low, high = ordered[(count - 1) // 2], ordered[count // 2]
        return (low.double() + high.double()) / 2


class TrimmedMean(OrderStatistic):
    """The mean of each number without its largest and its smallest values.

        Δ̃[j] = mean of the middle n - 2 ⌈β n⌉ of { Δ_u[j] : u in the cohort of n }
                                                   (Yin et al. 2018, arXiv 1803.01498, option II)

    As long as at most a share β of the clients is hostile, each number stays within the range of
    the honest values. The paper leaves out β n values at each end; this rounds up, and leaves at
    least one value, or two of an even number.

    Args:
        share: β, from 0 to below 0.5.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    @classmethod
    def of(cls, config: ServerConfig) -> Self:
        """An empty one with the share ``trim_share`` of a server."""
        return cls(config.trim_share)

    def _of_ordered(self, ordered: torch.Tensor) -> torch.Tensor:
        count = len(ordered)
        cut = min(math.ceil(self._share * count - _ROUNDING), (count - 1) // 2)
        return ordered[cut : count - cut].double().mean(dim=0)


class FoolsGold(Collection):
    """The mean of the updates, in which those count little that say the same as another.

    Honest clients of a recommender have histories of their own, and so their updates point in
    directions of their own. Clients that follow one plan are alike. Each update counts by how
    unlike it is to the one that is most like it (Fung et al. 2018, arXiv 1808.04866, algorithm 1):

        v_u = max over w ≠ u of cos(Δ_u, Δ_w)
        c_uw = cos(Δ_u, Δ_w) · min(1, v_u / v_w)     spares those who are only like a sybil
        a_u = 1 - max over w ≠ u of c_uw, then over the median of a, at most 1
        α_u = ln(a_u / (1 - a_u)) + 1/2, within [0, 1]
        Δ̃ = Σ α_u Δ_u / Σ α_u

    Unlike in the paper, cosines are of the updates of one round, over all numbers, since the server
    keeps nothing of a client from round to round; and the sum is a mean. The paper divides by the
    largest a, which lets one client that sends zeros make all others count little. As long as most
    are honest, the median is theirs. Where no update counts, all count alike. A length is no
    direction: add a clip to ``federation.stages``.

    Two clients with one history count as one plan, too.
    """

    def _combine(self) -> dict[str, torch.Tensor]:
        alphas = self._alphas()
        total = alphas.sum()
        combined = {}
        for name, first in self._held[0].items():
            mean = torch.zeros(first.shape, dtype=torch.float64)
            for alpha, held in zip(alphas.tolist(), self._held, strict=True):
                mean.add_(held[name], alpha=alpha)
            combined[name] = (mean / total).to(torch.float32)
        return combined

    def _alphas(self) -> torch.Tensor:
        """α of each update, float64 [clients], not all of them 0."""
        same = torch.ones(len(self._held), dtype=torch.float64)
        if len(self._held) == 1:
            return same
        cosines = self._cosines()
        closest = cosines.amax(dim=1).clamp(min=_ROUNDING)
        spared = cosines * (closest[:, None] / closest[None, :]).clamp(max=1)
        unlike = (1 - spared.amax(dim=1)).clamp(0, 1)
        usual = unlike.median()
        if not bool(usual > _ROUNDING):
            return same
        alphas = (torch.special.logit((unlike / usual).clamp(max=1)) + 0.5).clamp(0, 1)
        return alphas if bool(alphas.any()) else same

    def _cosines(self) -> torch.Tensor:
        """Cosines between the updates, float64 [clients, clients], with -1 on the diagonal."""
        products = torch.zeros(len(self._held), len(self._held), dtype=torch.float64)
        for name in self._held[0]:
            rows = torch.stack([held[name].flatten() for held in self._held]).double()
            products += rows @ rows.T
        lengths = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return (products / lengths[:, None] / lengths[None, :]).fill_diagonal_(-1)


AGGREGATORS: Mapping[Aggregation, type[Aggregator]] = {
    Aggregation.MEAN: WeightedMean,
    Aggregation.MEDIAN: CoordinateMedian,
    Aggregation.TRIMMED_MEAN: TrimmedMean,
    Aggregation.FOOLSGOLD: FoolsGold,
}
"""The choices of ``federation.server.aggregator``."""
