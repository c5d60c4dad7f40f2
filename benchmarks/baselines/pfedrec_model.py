"""PFedRec (Zhang et al. 2023, IJCAI, arXiv 2301.08143): dual personalisation, all clients at once.

The server keeps an embedding e(i) per item; client u keeps a score function of its own, one
linear layer, p(i) = σ(θ_u · e(i) + b_u). In a round a client takes the server's embeddings, and
for each batch of its positives (y = 1) and sampled negatives (y = 0), with the binary
cross-entropy L = mean of -y log p - (1 - y) log(1 - p), it steps twice:

    θ_u ← θ_u - lr · mean (p - y) e(i)        b_u ← b_u - lr · mean (p - y)
    e(i) ← e(i) - lr_items · (p' - y) θ_u / batch

p' being computed with the new θ_u and b_u. It ranks with its own embeddings after these steps
(the second personalisation); the server averages those of all clients. lr_items is
lr · lr_eta · items, as published.

No gradient goes through more than these two lines, so they are written out and taken for many
clients in one pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pfm_llm.base.seeding import generator

_FLOATS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Settings:
    """Sizes and rates; the defaults are those of the published code for MovieLens-100K.

    Attributes:
        dim: Of an item's embedding.
        lr: Of the score functions.
        lr_eta: Ratio of the rates, see the module.
        num_negatives: Per positive, drawn anew in each round.
        batch: Examples of one client per step.
        rounds: At most; the best on validation counts.
    """

    dim: int = 32
    lr: float = 0.1
    lr_eta: float = 80.0
    num_negatives: int = 4
    batch: int = 256
    rounds: int = 100


@dataclass(frozen=True)
class State:
    """Everything that is trained, float32.

    Attributes:
        items: [num_items, d], the server's.
        weights: [num_users, d], θ of each client.
        biases: [num_users], b of each client.
    """

    items: torch.Tensor
    weights: torch.Tensor
    biases: torch.Tensor


@dataclass(frozen=True)
class Examples:
    """What one client trains on in a round, shuffled.

    Attributes:
        items: int64 [n].
        labels: float32 [n], 1 for its own items, 0 for sampled negatives.
    """

    items: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Round:
    """What a round leaves.

    Attributes:
        state: The next one.
        scores: float32 [num_users, num_items], each client's own after its steps: logits.
        loss: Mean over clients of the mean loss of their examples.
    """

    state: State
    scores: np.ndarray
    loss: float


def initial_state(num_users: int, num_items: int, dim: int, seed: int) -> State:
    """Embeddings from N(0, 1), and a layer from U(±1/√d) that all clients start from."""
    random = generator(seed, "pfedrec initial")
    items = torch.randn(num_items, dim, generator=random)
    layer = (2 * torch.rand(dim + 1, generator=random) - 1) / dim**0.5
    return State(items, layer[:dim].repeat(num_users, 1), layer[dim:].repeat(num_users))


def take_round(state: State, examples: Sequence[Examples], settings: Settings) -> Round:
    """All clients train, and the server averages.

    Args:
        state: Before the round.
        examples: Per user; a user without any takes no part, and ranks with what it was given.
        settings: Rates and batch.
    """
    num_items = len(state.items)
    total, losses = torch.zeros_like(state.items), []
    weights, biases = state.weights.clone(), state.biases.clone()
    scores = (state.weights @ state.items.T + state.biases[:, None]).numpy()
    for users in _chunks(examples, state.items.numel()):
        # Each client's own copy of the embeddings, one after another.
        local = state.items.repeat(len(users), 1)
        theta, bias = weights[users], biases[users]
        losses.append(_train(local, theta, bias, [examples[user] for user in users], settings))
        own = local.view(len(users), num_items, -1)
        weights[users], biases[users] = theta, bias
        scores[users] = torch.baddbmm(bias[:, None, None], own, theta[:, :, None])[:, :, 0].numpy()
        total += own.sum(0)
    count = sum(map(len, losses))
    items = total / count if count else state.items
    loss = float(torch.cat(losses).mean()) if losses else 0.0
    return Round(State(items, weights, biases), scores, loss)


def _chunks(examples: Sequence[Examples], numel: int) -> Iterator[list[int]]:
    """Users with examples, those of like size together, as many as memory allows."""
    users = sorted(
        (user for user, own in enumerate(examples) if len(own.items)),
        key=lambda user: len(examples[user].items),
    )
    size = max(1, _FLOATS_AT_ONCE // numel)
    for start in range(0, len(users), size):
        yield users[start : start + size]


def _train(
    local: torch.Tensor,
    theta: torch.Tensor,
    bias: torch.Tensor,
    examples: Sequence[Examples],
    settings: Settings,
) -> torch.Tensor:
    """One pass over the clients' examples, in place; their mean losses, float32 [clients]."""
    num_items = len(local) // len(examples)
    lr_items = settings.lr * settings.lr_eta * num_items
    labels = _pad([own.labels for own in examples])
    present = _pad([np.ones_like(own.labels) for own in examples])
    starts = num_items * torch.arange(len(examples))[:, None]
    places = starts + _pad([own.items for own in examples])
    total = torch.zeros(len(examples))
    for start in range(0, labels.shape[1], settings.batch):
        part = slice(start, start + settings.batch)
        y, here = labels[:, part], present[:, part]
        # A client whose examples are used up divides by 1 what is 0 everywhere.
        share = here / here.sum(1, keepdim=True).clamp(min=1)
        embedded = local[places[:, part]]
        logits = _logits(embedded, theta, bias)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        total += (losses * here).sum(1)
        error = (torch.sigmoid(logits) - y) * share
        theta -= settings.lr * torch.einsum("cb,cbd->cd", error, embedded)
        bias -= settings.lr * error.sum(1)
        error = (torch.sigmoid(_logits(embedded, theta, bias)) - y) * share
        change = -lr_items * error[:, :, None] * theta[:, None, :]
        local.index_add_(0, places[:, part].flatten(), change.flatten(0, 1))
    return total / present.sum(1)


def _logits(embedded: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cbd,cd->cb", embedded, theta) + bias[:, None]


def _pad(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    tensors = [torch.from_numpy(array) for array in arrays]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
