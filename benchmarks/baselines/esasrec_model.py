"""eSASRec (Tikhonovich et al. 2025, arXiv 2508.06450): SASRec with LiGR layers and sampled softmax.

It predicts the next item at every position, as SASRec does. A layer gates what it adds
(Borisyuk et al. 2025, arXiv 2502.03417), with the gate on the state before normalisation:

    h' = h + σ(W h + b) ⊙ F(LayerNorm(h))

for F causal attention, and then for F a SwiGLU network of four times the width (Shazeer 2020,
arXiv 2002.05202). The loss is a cross-entropy over the next item and K negatives, drawn uniformly
without replacement from the whole catalogue:

    L = mean over t of -log [ exp s_t·e(i_{t+1}) / (exp s_t·e(i_{t+1}) + Σ_j exp s_t·e(j)) ]

A negative that is the next item itself is left out of the sum. Since training knows of no held-out
event, no negative can tell one. One draw serves all positions of a step; the published code draws
for each position, at K times the cost.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from benchmarks.baselines.sasrec_model import NO_TARGET, SasRec, Settings

METHOD = "esasrec"
_WIDER = 4


@dataclass(frozen=True)
class ESettings(Settings):
    """What an eSASRec is made of and trained with.

    Attributes:
        dim: Width d; the default is what validation chose for SASRec on MovieLens-100K.
        negatives: K, at most the size of the catalogue.
    """

    dim: int = 64
    negatives: int = 256


GRID = (ESettings(), ESettings(dropout=0.5), ESettings(dropout=0.2))
"""What ``--grid`` compares on validation, without it the first; as many as for SASRec.

The last dropout is that of the published settings.
"""


class LigrLayer(nn.Module):
    """Attention and a feed-forward network, each behind a gate.

    Args:
        settings: Its sizes.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        dim, wide = settings.dim, _WIDER * settings.dim
        self.attention = nn.MultiheadAttention(
            dim, settings.num_heads, settings.dropout, batch_first=True
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.up = nn.Linear(dim, 2 * wide, bias=False)
        self.down = nn.Linear(wide, dim, bias=False)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States after the layer.

        Args:
            x: float32 [windows, T, d].
            mask: float32 [T, T], added to the logits of attention.

        Returns:
            float32 [windows, T, d].
        """
        normed = self.norms[0](x)
        attended, _ = self.attention(
            normed, normed, normed, attn_mask=mask, need_weights=False, is_causal=True
        )
        x = x + torch.sigmoid(self.gates[0](x)) * self.dropout(attended)
        gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
        fed = self.down(self.dropout(functional.silu(gate) * value))
        return x + torch.sigmoid(self.gates[1](x)) * self.dropout(fed)


class LigrLayers(nn.Module):
    """All layers, and a normalisation after the last.

    Args:
        settings: Their number and sizes.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LigrLayer(settings) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(settings.dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """States after the last layer, float32 [windows, T, d]; see `LigrLayer.forward`."""
        assert is_causal
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class ESasRec(SasRec):
    """The network.

    Args:
        num_items: Size of the catalogue.
        settings: Its sizes, an `ESettings`.
    """

    def __init__(self, num_items: int, settings: ESettings) -> None:
        super().__init__(num_items, settings)
        self.negatives = min(settings.negatives, num_items)

    def make_layers(self, settings: Settings) -> nn.Module:
        """`LigrLayers`."""
        return LigrLayers(settings)

    def loss(self, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean sampled softmax at the positions that have a target; draws from torch's state.

        Args:
            items: int64 [windows, T].
            targets: int64 [windows, T], `NO_TARGET` where there is none.
        """
        known = targets != NO_TARGET
        states, wanted = self(items)[known], targets[known]
        weight = self.items.weight
        drawn = torch.randperm(len(weight))[: self.negatives]
        own = (states * weight[wanted]).sum(dim=1, keepdim=True)
        others = states @ weight[drawn].T
        others = others.masked_fill(wanted[:, None] == drawn, -torch.inf)
        first = torch.zeros(len(wanted), dtype=torch.int64)
        return functional.cross_entropy(torch.cat([own, others], dim=1), first)
