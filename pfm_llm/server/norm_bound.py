"""The bound on the size of an update, relative to the updates that were accepted before it.

A mean has no defence of its own: one client can move it as far as it likes, and the moments of
``fedadam`` remember that for thousands of rounds. A bound on the norm keeps the harm of one update
within a multiple of what an honest one does (arXiv 1911.07963). The median of the norms that were
met makes the bound fit to any model and data (arXiv 1905.03871 adapts a bound to a quantile).
"""

import math
from collections.abc import Mapping, Sequence

import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.config.choices import LocalOptimizer
from pfm_llm.config.schema import LocalConfig
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.types import Refusal, Tensors

_REFUSED_FROM = 100.0
_CLIPPED_FROM = 50.0
"""Multiples of the median. Honest updates stay below 20: see `NormBound`."""

_MOST_EXAMPLES = 10_000.0
"""Likewise of ``num_examples``, which is honest for a silo of thousands of users among users."""

_LEAST_NORM, _LEAST_ENTRY = 4e-2, 2e-2
"""The medians of a tensor count as at least these shares of the median norm of whole updates."""

_WINDOW, _FEWEST = 64, 8
"""The median is of so many of the newest sizes. With fewer than the latter there is none yet."""

_FIRST_NORM, _FIRST_ENTRY = 300.0, 100.0
_FIRST_ADAM_STEP = 10.0
"""Bounds while there is no median: of a gradient, and of an entry in a step of AdamW at rate 1.

Honest first gradients had norms up to 18 and entries up to 5. A step of AdamW from fresh moments
moves an entry by its rate, or little more.
"""


class NormBound:
    """Refuses updates that are far too large, and scales down those that are merely too large.

    The *sizes* of an update are its Euclidean norm over all tensors, and for each tensor its norm
    and the magnitude of its largest entry, so that neither a small tensor nor a single coordinate
    hides behind the rest. With s a size and m the median of that size over the newest accepted
    updates, at least 1/25 (a norm) or 1/50 (an entry) of the median norm of whole updates:

    - some s > 100 m: the update is refused.
    - else some s > 50 m: Δ ← Δ · min over sizes of 50 m / s.
    - else not a bit of it is changed.

    The margin is wide. In the tiny runs of all methods and in default runs on MovieLens-100K,
    honest norms of whole updates stayed below 3 m, and any size below 20 m. Those came from tensors
    that get a gradient only once another one has moved from zero, such as the factors A of a LoRA.
    Their first gradients are as good as zero, and grow a hundredfold in ten rounds, hence the least
    m. Nor is an entry of an item's bias small, up to 1, for a client with a single example. A size
    of exactly 0 says nothing of the scale, and is not counted.

    As long as a size was met fewer than 8 times, stated bounds refuse instead. With rate · steps of
    local training, a norm may be 300 times that with SGD and an entry 100 times (or both
    ``max_grad_norm`` times it, where that is less). With AdamW an entry may be 10 times that, and a
    norm 10 √n times it for n numbers.

    ``num_examples`` is bounded likewise, at 10,000 times its median, since it may be a weight.

    The medians change between rounds alone. So what is refused depends neither on the order in
    which updates arrive nor on the number of processes.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], local: LocalConfig) -> None:
        """Start without a median.

        Args:
            tensors: The tensors of an update, as the contract lists them.
            local: The local training, from which the first bounds follow.
        """
        self._tensors = tuple(tensors)
        # The order of `_sizes`: the update, then each tensor's norm, then each largest entry.
        counts = [math.prod(spec.shape) for spec in tensors.values()]
        counts = [sum(counts), *counts, *[1] * len(counts)]
        self._first = torch.tensor([*_first_bounds(counts, local), math.inf], dtype=torch.float64)
        self._newest = torch.zeros(len(self._first), _WINDOW, dtype=torch.float64)
        self._bounds = self._make_bounds()

    @property
    def state(self) -> torch.Tensor:
        """The newest sizes of accepted updates, float64 [sizes, 64], oldest first after zeros."""
        return self._newest.clone()

    @state.setter
    def state(self, newest: torch.Tensor) -> None:
        self._newest = newest.clone()
        self._bounds = self._make_bounds()

    def bounded(
        self, client_id: str, delta: Tensors, num_examples: int
    ) -> tuple[Tensors, torch.Tensor]:
        """Bound one update.

        Args:
            client_id: The sender, for the message.
            delta: The tensors of the contract, after the stages.
            num_examples: What the update says.

        Returns:
            The tensors, scaled down if need be, and their sizes for `learn`.

        Raises:
            ContractError: The update is beyond a bound, or not finite.
        """
        sizes = self._sizes(delta, num_examples)
        refused, clipped = self._bounds
        if not bool(torch.isfinite(sizes).all()):
            raise ContractError(
                f"client {client_id!r:.80}: a stage made its update not finite", Refusal.NOT_FINITE
            )
        excess = sizes / refused
        worst = int(excess.argmax())
        if excess[worst] > 1:
            raise ContractError(
                f"client {client_id!r:.80}: {self._name(worst)} is {float(sizes[worst]):.3g}, at "
                f"most {float(refused[worst]):.3g} is accepted after the updates so far; if the "
                "client is honest, bound its gradient by federation.local.max_grad_norm",
                Refusal.TOO_LARGE,
            )
        scale = float((clipped / sizes)[:-1].min())  # of a size of 0: infinite
        if scale >= 1:
            return delta, sizes
        scaled = {
            name: (tensor.double() * scale).to(tensor.dtype) for name, tensor in delta.items()
        }
        return scaled, self._sizes(scaled, num_examples)

    def learn(self, accepted: Sequence[torch.Tensor]) -> None:
        """Take in the sizes of a round's accepted updates.

        They are kept sorted, each size on its own. So the order of updates has no effect, and
        nobody who sees the server's folder can tell which sizes are of one client.

        Args:
            accepted: What `bounded` returned for each update, float64 [sizes].
        """
        ordered = torch.stack(list(accepted)).sort(dim=0).values
        if len(ordered) > _WINDOW:  # an even choice: the last ones are the largest
            ordered = ordered[torch.linspace(0, len(ordered) - 1, _WINDOW).round().long()]
        for sizes in ordered:
            met = sizes > 0
            self._newest[met] = self._newest[met].roll(-1, dims=1)
            self._newest[met, -1] = sizes[met]
        self._bounds = self._make_bounds()

    def _sizes(self, delta: Tensors, num_examples: int) -> torch.Tensor:
        norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in delta.values()]
        largest = [float(t.abs().max()) if t.numel() else 0.0 for t in delta.values()]
        every = [math.hypot(*norms), *norms, *largest, num_examples]
        return torch.tensor(every, dtype=torch.float64)

    def _make_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sizes beyond which an update is refused, and is scaled down."""
        met = self._newest > 0
        medians = self._newest.where(met, math.nan).nanmedian(dim=1).values
        norms, entries = medians[1:-1].chunk(2)  # views
        whole = medians[0].nan_to_num()
        norms.clamp_(min=float(_LEAST_NORM * whole))
        entries.clamp_(min=float(_LEAST_ENTRY * whole))
        known = met.sum(dim=1) >= _FEWEST
        refused, clipped = _REFUSED_FROM * medians, _CLIPPED_FROM * medians
        refused[-1] = _MOST_EXAMPLES * medians[-1]
        return refused.where(known, self._first), clipped.where(known, self._first)

    def _name(self, index: int) -> str:
        number = len(self._tensors)
        if index == 0:
            return "the norm of its update"
        if index > 2 * number:
            return "its num_examples"
        kind = "norm" if index <= number else "largest entry"
        return f"the {kind} of {self._tensors[(index - 1) % number]}"


def _first_bounds(counts: list[int], local: LocalConfig) -> list[float]:
    """A bound on each size, of which ``counts`` numbers are part, while there is no median."""
    reach = local.shared_lr * local.shared_local_steps
    if local.shared_optimizer is LocalOptimizer.ADAMW:
        return [_FIRST_ADAM_STEP * reach * math.sqrt(max(count, 1)) for count in counts]
    longest = 1.01 * (local.max_grad_norm or math.inf)
    bounds = (_FIRST_ENTRY if count == 1 else _FIRST_NORM for count in counts)
    return [min(bound, longest) * reach for bound in bounds]
