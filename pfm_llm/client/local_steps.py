"""Gradient steps on stacked tensors of many clients, each independent of the others.

All tensors have a leading client dimension [C, ...]. Every operation is element-wise or a norm per
client, so a step on a chunk equals steps on its clients one at a time.
"""

from collections.abc import Mapping, Sequence

import torch

from pfm_llm.config.choices import LocalOptimizer

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class StackedOptimizer:
    """SGD, or AdamW (arXiv 1711.05101, Alg. 2) with fresh moments and without weight decay.

    Args:
        kind: Which rule.
        lr: Learning rate.
        max_grad_norm: Clip each client's gradient, over all tensors, to this norm.
    """

    def __init__(self, kind: LocalOptimizer, lr: float, max_grad_norm: float | None = None) -> None:
        self._kind = kind
        self._lr = lr
        self._max_grad_norm = max_grad_norm
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps = 0

    @torch.no_grad()
    def step(
        self, tensors: Mapping[str, torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One step; the given tensors are not changed.

        Args:
            tensors: Name to value [C, ...].
            gradients: Gradients in the same order.

        Returns:
            New leaf tensors that require gradients. Without tensors no step is counted.
        """
        if not tensors:
            return {}
        self._steps += 1
        if self._max_grad_norm is not None:
            gradients = clip_per_client(gradients, self._max_grad_norm)
        return {
            name: self._stepped(name, value.detach(), gradient).requires_grad_()
            for (name, value), gradient in zip(tensors.items(), gradients, strict=True)
        }

    def _stepped(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if self._kind is LocalOptimizer.SGD:
            return value - self._lr * gradient
        beta1, beta2 = _BETAS
        first, second = self._moments.get(name) or (
            torch.zeros_like(value),
            torch.zeros_like(value),
        )
        first = torch.lerp(first, gradient, 1 - beta1)
        second = torch.lerp(second, gradient * gradient, 1 - beta2)
        self._moments[name] = (first, second)
        corrected = first / (1 - beta1**self._steps)
        scale = (second / (1 - beta2**self._steps)).sqrt_().add_(_EPS)
        return value - self._lr * corrected / scale


def clip_per_client(gradients: Sequence[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    """Scale each client's gradient so that its norm over all tensors is at most ``max_norm``.

    Args:
        gradients: Tensors [C, ...].
        max_norm: The bound.
    """
    squares = [g.reshape(len(g), -1).square().sum(1) for g in gradients]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (max_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    return [g * factors.view(-1, *([1] * (g.dim() - 1))) for g in gradients]
