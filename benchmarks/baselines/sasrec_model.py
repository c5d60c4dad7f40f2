"""SASRec (Kang & McAuley 2018, arXiv 1808.09781), trained with the full cross-entropy.

A history i_1 … i_n is read by a causal transformer, x_t = √d · e(i_t) + p(t), and its state s_t
after item t scores item j by the inner product s_t · e(j) with the same embeddings as at the
input. The loss is the cross-entropy of the next item over the whole catalogue (Klenitskiy &
Vasilev 2023, arXiv 2309.07602), without sampled negatives:

    L = mean over t of -log softmax_j(s_t · e(j))[i_{t+1}]

Training reads the whole history in windows that do not overlap, cut from the newest end; scoring
reads the newest window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix

NO_TARGET = -100
"""Marks padding among the targets; the loss passes over it."""

_QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class Settings:
    """What a SASRec is made of and trained with.

    Attributes:
        dim: Width d.
        num_layers: Transformer layers.
        num_heads: Attention heads; must divide ``dim``.
        dropout: On embeddings, attention and both branches of a layer.
        window: Items that it can read.
        lr: Of AdamW.
        batch: Windows per step.
        epochs: At most; the best on validation counts.
    """

    dim: int = 128
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.3
    window: int = 100
    lr: float = 1e-3
    batch: int = 16
    epochs: int = 30


class SasRec(nn.Module):
    """The network.

    Args:
        num_items: Size of the catalogue.
        settings: Its sizes.
    """

    def __init__(self, num_items: int, settings: Settings) -> None:
        super().__init__()
        dim = settings.dim
        self.window = settings.window
        self.items = nn.Embedding(num_items, dim)
        self.positions = nn.Embedding(settings.window, dim)
        nn.init.normal_(self.items.weight, std=1 / dim)
        nn.init.normal_(self.positions.weight, std=1 / math.sqrt(dim))
        self.dropout = nn.Dropout(settings.dropout)
        self.layers = self.make_layers(settings)

    def make_layers(self, settings: Settings) -> nn.Module:
        """The transformer, from x [windows, T, d] to states of the same shape."""
        dim = settings.dim
        layer = nn.TransformerEncoderLayer(
            dim, settings.num_heads, dim, settings.dropout, batch_first=True, norm_first=True
        )
        return nn.TransformerEncoder(
            layer, settings.num_layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """States after each item.

        Args:
            items: int64 [windows, T], oldest first, T at most ``window``. Padding comes last,
                where no state before it can see it.

        Returns:
            float32 [windows, T, d].
        """
        length = items.shape[1]
        scale = math.sqrt(self.items.embedding_dim)
        x = self.dropout(scale * self.items(items) + self.positions.weight[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.layers(x, mask=mask, is_causal=True)

    def loss(self, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the catalogue at the positions that have a target.

        Args:
            items: int64 [windows, T].
            targets: int64 [windows, T], `NO_TARGET` where there is none.
        """
        known = targets != NO_TARGET
        states = self(items)[known]
        return functional.cross_entropy(states @ self.items.weight.T, targets[known])

    @torch.no_grad()
    def score(self, histories: Histories) -> ScoreMatrix:
        """Score every item as the next one, from the state after the whole history.

        Args:
            histories: Per query the item ids, oldest first, at least one.

        Returns:
            float32 [queries, num_items].

        Raises:
            DataError: A history is empty.
        """
        if any(not len(history) for history in histories):
            raise DataError("SASRec cannot score an empty history; leave such queries out")
        self.eval()
        scores = [np.zeros((0, self.items.num_embeddings), np.float32)]
        for start in range(0, len(histories), _QUERIES_AT_ONCE):
            newest = [h[-self.window :] for h in histories[start : start + _QUERIES_AT_ONCE]]
            states = self(pad(newest, 0))
            last = torch.tensor([len(history) - 1 for history in newest])
            scores.append((states[torch.arange(len(last)), last] @ self.items.weight.T).numpy())
        return np.concatenate(scores)


def cut(history: np.ndarray, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Items and their next items in windows of at most ``window``, cut from the newest end.

    Args:
        history: int [n], oldest first.
        window: Longest window.

    Returns:
        Pairs of equal length, newest window first; none for fewer than two items.
    """
    items, targets = history[:-1], history[1:]
    return [
        (items[max(end - window, 0) : end], targets[max(end - window, 0) : end])
        for end in range(len(items), 0, -window)
    ]


def pad(arrays: Sequence[np.ndarray], filling: int) -> torch.Tensor:
    """Arrays of different lengths as one tensor, filled at their ends, int64 [arrays, longest]."""
    tensors = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filling)
