"""The error of averaging LoRA factors instead of their products.

With clients u of weight w_u (summing to 1), averaging gives A^ = sum w_u A_u, B^ = sum w_u B_u. The
exact average is the mean of the products B_u A_u. Per round, over all adapted layers::

    error = |sum_u w_u B_u A_u - B^ A^|_F / |sum_u w_u B_u A_u|_F

(arXiv 2410.09432, equation 3, states the difference.) The error is 0 if all clients have the same
A or the same B, as in FFA-LoRA. The norms are computed from the Gram matrices of the stacked
factors, without a dense product.

This is a diagnostic for simulations: it keeps the factors of all clients until the round ends.
"""

from collections.abc import Sequence

import torch

from pfm_llm.protocol.types import Tensors, lora_modules, lora_name

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module to A [r, in] and B [out, r], float32."""


def factors_of(tensors: Tensors, delta: Tensors) -> Factors:
    """A client's factors after its local steps.

    Args:
        tensors: The shared tensors that it received.
        delta: Its change of them; a factor that it did not send is unchanged.
    """

    def factor(name: str) -> torch.Tensor:
        return tensors[name] + delta[name] if name in delta else tensors[name]

    return {
        module: (factor(lora_name(module, "A")), factor(lora_name(module, "B")))
        for module in lora_modules(tensors)
    }


def aggregation_error(clients: Sequence[tuple[float, Factors]]) -> float | None:
    """The error of one round, at least 0; None without clients or while all products are zero.

    Args:
        clients: Weight, above 0, and factors of each client.
    """
    total = sum(weight for weight, _ in clients)
    squared_difference = squared_norm = 0.0
    for module in clients[0][1] if clients else ():
        weights = [weight / total for weight, _ in clients]
        a = [own[module][0].double() for _, own in clients]
        b = [own[module][1].double() for _, own in clients]
        mean_a = sum((w * x for w, x in zip(weights, a, strict=True)), torch.zeros_like(a[0]))
        mean_b = sum((w * x for w, x in zip(weights, b, strict=True)), torch.zeros_like(b[0]))
        scaled = [w * x for w, x in zip(weights, b, strict=True)]
        squared_norm += _squared_norm(scaled, a)
        squared_difference += _squared_norm([*scaled, -mean_b], [*a, mean_a])
    if squared_norm <= 0:
        return None
    return float((max(squared_difference, 0.0) / squared_norm) ** 0.5)


def _squared_norm(b: Sequence[torch.Tensor], a: Sequence[torch.Tensor]) -> float:
    """|sum_k B_k A_k|^2 = sum of the entries of (B'B) * (A A') for the stacked factors."""
    left, right = torch.cat(list(b), 1), torch.cat(list(a), 0)
    return float(((left.T @ left) * (right @ right.T)).sum())
