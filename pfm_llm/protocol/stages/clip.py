"""Clipping: it bounds the length by which a client can move the aggregate."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pfm_llm.protocol.stages.stage import StageContext, UpdateStage
from pfm_llm.protocol.types import Tensors, euclidean_norm

_MARGIN = 1e-6
"""A clipped update is this share below the bound, so that rounding cannot lift it above."""


@dataclass(frozen=True)
class Clip(UpdateStage):
    """Scales an update whose Euclidean norm exceeds a bound C.

        Δ ← Δ · min(1, C / ‖Δ‖₂)

    The norm covers all numbers of all tensors that are sent, in float64: for shapes [a, b], [c], …
    it covers a · b + c + … numbers (arXiv 1710.06963, "flat clipping"; arXiv 1911.07963 uses it as
    a defence). The client clips its update, and the server clips every arriving update again. The
    server does not change a single bit of an honest update, as long as it is sent in float32;
    ``federation.transport: bfloat16`` rounds it after the client has clipped. Under masks the
    server sees the length of the sum alone.

    Attributes:
        norm: The bound C, above 0.
    """

    norm: float
    works_masked: ClassVar[bool] = True

    def on_client(self, delta: Tensors, context: StageContext) -> Tensors:
        """Clip the update. One that is not finite stays unchanged; the server refuses it."""
        return self._clipped(delta, euclidean_norm(delta))

    def on_server(self, delta: Tensors, context: StageContext) -> tuple[Tensors, float | None]:
        """Clip the update, and note its norm before clipping."""
        norm = euclidean_norm(delta)
        return self._clipped(delta, norm), norm

    def summary(self, noted: Sequence[float]) -> Mapping[str, float]:
        """The number of updates at or above the bound, and figures of the arriving norms.

        ``largest_norm`` above the bound means that a client did not clip.
        """
        return {
            "clipped": sum(norm >= self.norm * (1 - 2 * _MARGIN) for norm in noted),
            "median_norm": statistics.median(noted),
            "largest_norm": max(noted),
        }

    def _clipped(self, delta: Tensors, norm: float) -> Tensors:
        if not self.norm < norm < math.inf:
            return delta
        scale = self.norm / norm * (1 - _MARGIN)  # may be too small for float32
        return {name: (tensor.double() * scale).to(tensor.dtype) for name, tensor in delta.items()}
