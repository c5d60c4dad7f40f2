"""The recommender head: user states and item texts in one whitened space.

Everything here is a plain function of the tensors of *one* client, so training, evaluation and
serving run the same code. Let ``n`` be the whitened user state (all d dimensions) and ``z_i`` the
whitened text embedding of item i (the first D dimensions)::

    u        = (state_proj n  [+ B A n, the private head term]) r / (r + n_s)  [+ context_proj c]
    score_i  = scale * ( u . item_proj z_i  [+ u . item_ids_out e_i] ) [+ bias_i]

With ``item_ids: both``, ``item_ids_in e_i`` is also added to the hidden state at the last token of
item i, where the adapted layers begin. ``item_proj`` starts as the identity, and ``state_proj`` at
zero: a pass that has learned nothing yet adds no noise to the rest. With ``window.reading:
tokens``, and in methods that do not train it, ``state_proj`` starts as the (truncated) identity, so
that training starts from the similarity of whitened states.

With ``item_context``, c holds two weighted means of the window's items up to the position::

    c   = [c_1; c_2],   c_k = r / (r + n_k)  sum_s w_s x_s / sum_s w_s,   w_s = 2^(-a_s / h_k)

for items s that are a_s items old, x_s = [z_s; e_s], with learned half-lives h_k. This path from
the items of the history to the scores passes no transformer layer. It is a low-rank Markov chain of
higher order, as in Fossil (He and McAuley 2016, arXiv 1609.09152).

With ``prior_events``, what r items tell of a user counts r / (r + n), with n events learned for the
state and for each mean. A user of whom little is known is therefore served nearly by the biases
alone, as one of whom nothing is known. Shrinkage of this form is that of a mean under a prior worth
n events.

With ``item_met``, the federation learns which items somebody has met. ``head.item_met`` starts at
zero, and each client's update raises the entries of its own items (`met_term`). An entry is above
zero just where a client that took part has met the item. An item that nobody has met is no negative
in training, and has no embedding: e_i counts as zero. Its text alone ranks it, with a bias of zero.
As one entry of a sum over clients, this knowledge can be masked and noised like any other.

With the task ``like`` an item also has log-odds of being liked, equal for all users::

    like_i = like_text . z_i / sqrt(D) [+ like_ids . e'_i / sqrt(E)] [+ like_bias_i]

with e'_i the standardised ID embedding (`standard_ids`). The preferences of one user are in the
private part alone (`taste`).

Shapes: d hidden size, D ``head.dim``, I items, E ``head.id_dim``. With ``item_ids: codes`` a shared
tensor has a row for each code vector in place of one for each item; `items.codes` sums them up.

====================  ========  ===========================
parameter             shape     present with
====================  ========  ===========================
head.state_proj       [D, d]    always
head.state_log_n      [1]       ``prior_events``; log of n_s, in items
head.item_proj        [D, D]    always
head.item_bias        [I]       ``item_bias``
head.item_met         [I]       ``item_met``
head.item_ids         [I, E]    ``item_ids: output | both | codes``
head.item_ids_out     [D, E]    ``item_ids: output | both | codes``
head.item_ids_in      [d, E]    ``item_ids: both | codes``
head.context_proj     [D, 2 W]  ``item_context``; W is D + E, or D without ``item_ids``
head.context_log_h    [2]       ``item_context``; log of the half-lives, in items
head.context_log_n    [2]       the same, and ``item_context``; log of n_1 and n_2, in items
head.like_text        [D]       task ``like``
head.like_ids         [E]       the same, and ``item_ids``
head.like_bias        [I]       task ``like`` and ``item_bias``
====================  ========  ===========================
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from pfm_llm.base import seeding
from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import ItemIds, Reading, Task
from pfm_llm.config.methods import SPECS
from pfm_llm.config.model import HeadConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import learns_met
from pfm_llm.protocol.parameters import Parameter, Sizes, Unseen
from pfm_llm.protocol.types import Tensors

STATE_PROJ = "head.state_proj"
STATE_LOG_N = "head.state_log_n"
ITEM_PROJ = "head.item_proj"
ITEM_BIAS = "head.item_bias"
ITEM_MET = "head.item_met"
ITEM_IDS = "head.item_ids"
ITEM_IDS_IN = "head.item_ids_in"
ITEM_IDS_OUT = "head.item_ids_out"
CONTEXT_PROJ = "head.context_proj"
CONTEXT_LOG_H = "head.context_log_h"
CONTEXT_LOG_N = "head.context_log_n"
LIKE_TEXT = "head.like_text"
LIKE_IDS = "head.like_ids"
LIKE_BIAS = "head.like_bias"

_BOTH_SIDES = (ItemIds.BOTH, ItemIds.CODES)
_MET_STEP = 1e-3
"""Gradient of an entry of ``head.item_met`` at a client that has met the item: small beside those
of other tensors, so that the norm of an update hardly depends on it."""
_ID_STD = 0.1
_HALF_LIVES = (1.5, 12.0)
"""Initial half-lives in items: a short one for the newest items and a long one for the window."""
_PRIOR_RATE = 1e-2
"""The server's learning rate of the logarithms of n_s, n_1 and n_2, before ``lr_scale``."""


def head_parameters(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    """The tensors of the module's table.

    Args:
        config: Head, tasks, seed and the server's learning rates.
        sizes: The sizes of hidden states and catalogue.

    Raises:
        ConfigError: ``head.dim`` exceeds the hidden size.
    """
    head, server, width = config.head, config.federation.server, sizes.hidden_size
    dim, id_dim, has_ids = head.dim, head.id_dim, head.item_ids is not ItemIds.NONE
    if dim > (most := min(width, sizes.item_width or width)):
        what = "the backbone's hidden size" if dim > width else "the width of the item encoder,"
        raise ConfigError(f"head.dim: {dim} exceeds {what} {most}; lower it")
    rate, id_rate, bias_rate = (
        rate * server.lr_scale for rate in (server.lr_head, server.lr_item_ids, server.lr_item_bias)
    )
    bias = Parameter(ITEM_BIAS, (sizes.num_items,), bias_rate, per_item=True, unseen=Unseen.MEAN)
    half_lives, paces = torch.tensor(_HALF_LIVES), (len(_HALF_LIVES),)
    ids = (sizes.num_items, id_dim)
    draw_ids = partial(_random_ids, ids, config.seed)
    context = (dim, len(_HALF_LIVES) * item_width(head))
    likes = Task.LIKE in config.tasks
    is_learned = config.window.reading is Reading.ITEMS and SPECS[config.method].trains(STATE_PROJ)
    starts_alike = None if is_learned else partial(torch.eye, dim, width)
    declared = [
        (True, Parameter(STATE_PROJ, (dim, width), rate, starts_alike)),
        (True, Parameter(ITEM_PROJ, (dim, dim), rate, partial(torch.eye, dim))),
        (head.item_bias, bias),
        (learns_met(config), Parameter(ITEM_MET, (sizes.num_items,), bias_rate, per_item=True)),
        (has_ids, Parameter(ITEM_IDS, ids, id_rate, draw_ids, per_item=True)),
        (has_ids, Parameter(ITEM_IDS_OUT, (dim, id_dim), id_rate)),
        (head.item_ids in _BOTH_SIDES, Parameter(ITEM_IDS_IN, (width, id_dim), id_rate)),
        (head.item_context, Parameter(CONTEXT_PROJ, context, rate)),
        (head.item_context, Parameter(CONTEXT_LOG_H, paces, rate, half_lives.log)),
        (likes, Parameter(LIKE_TEXT, (dim,), rate)),
        (likes and has_ids, Parameter(LIKE_IDS, (id_dim,), bias_rate)),
        (likes and head.item_bias, replace(bias, name=LIKE_BIAS)),
    ]
    return [parameter for is_there, parameter in declared if is_there] + _priors(config)


def _priors(config: ExperimentConfig) -> list[Parameter]:
    """The logarithms of n_s, n_1 and n_2."""
    events, rate = config.head.prior_events, _PRIOR_RATE * config.federation.server.lr_scale
    if events is None:
        return []
    counts = {STATE_LOG_N: 1} | (
        {CONTEXT_LOG_N: len(_HALF_LIVES)} if config.head.item_context else {}
    )
    return [
        Parameter(name, (count,), rate, torch.full((count,), events).log)
        for name, count in counts.items()
    ]


def _random_ids(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeding.generator(seed, "head")) * _ID_STD


def item_width(config: HeadConfig) -> int:
    """How many numbers describe an item: the text dimensions, plus those of an ID embedding."""
    return config.dim + (config.id_dim if config.item_ids is not ItemIds.NONE else 0)


def fading(ages: torch.Tensor, half_life: torch.Tensor) -> torch.Tensor:
    """2^(-age / half-life); 0 for ages below 0, which are later items."""
    weights: torch.Tensor = torch.exp2(-ages.clamp_min(0) / half_life) * (ages >= 0)
    return weights


def trust(num_read: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
    """How much items count that were read, r / (r + n); in [0, 1), of the arguments' joint shape.

    Args:
        num_read: r, at least 0.
        log_prior: Log of n.
    """
    return num_read / (num_read + log_prior.exp())


def met_items(head: Tensors) -> torch.Tensor | None:
    """Which items somebody has met, bool [I]; None where that is not learned."""
    return head[ITEM_MET] > 0 if ITEM_MET in head else None


def met_term(head: Tensors, items: torch.Tensor) -> torch.Tensor:
    """A term of a client's loss that is zero, and whose gradient says which items it has met.

    Args:
        head: One client's head parameters, with ``head.item_met``.
        items: int64 [M], the distinct items of its histories.
    """
    met = head[ITEM_MET][items]
    return _MET_STEP * (met.detach() - met).sum()


def with_met_rows(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One client's tensors, in which the embedding of an item that nobody has met is zero."""
    met = met_items(own)
    if met is None or ITEM_IDS not in own:
        return own
    return {**own, ITEM_IDS: own[ITEM_IDS] * met[:, None]}


def item_inputs(head: Tensors, items: torch.Tensor) -> torch.Tensor | None:
    """The ID term that is added to the hidden state at the last token of each item.

    Args:
        head: One client's head parameters.
        items: int64 [P].

    Returns:
        float32 [P, d], or None without ``item_ids: both``.
    """
    if ITEM_IDS_IN not in head:
        return None
    return F.embedding(items, head[ITEM_IDS]) @ head[ITEM_IDS_IN].T


def context_vectors(
    head: Tensors, items: torch.Tensor, item_texts: torch.Tensor
) -> torch.Tensor | None:
    """The term that the items of a window add to the user vector at each of its positions.

    Args:
        head: One client's head parameters.
        items: int64 [N, L], windows, oldest item first. Padding comes last and changes no
            position before it.
        item_texts: float32 [I, D], whitened.

    Returns:
        float32 [N, L, D], or None without ``item_context``.
    """
    if CONTEXT_PROJ not in head:
        return None
    read = item_texts[items]
    if ITEM_IDS in head:
        read = torch.cat([read, F.embedding(items, head[ITEM_IDS])], 2)
    place = torch.arange(items.shape[1], device=items.device)
    weights = fading(place[:, None] - place, head[CONTEXT_LOG_H].exp()[:, None, None])
    weights = weights / weights.sum(2, keepdim=True)
    if CONTEXT_LOG_N in head:
        weights = weights * trust(place[:, None] + 1, head[CONTEXT_LOG_N][:, None, None])
    summed = torch.einsum("kls,nsw->nlkw", weights, read).flatten(2)
    return summed @ head[CONTEXT_PROJ].T


def window_contexts(
    head: Tensors, windows: Sequence[torch.Tensor], item_texts: torch.Tensor
) -> torch.Tensor:
    """`context_vectors` at every position of some windows, float32 [P, D], one after another.

    Args:
        head: One client's head parameters, with ``item_context``.
        windows: int64 [L] each, oldest item first; P items in all.
        item_texts: float32 [I, D], whitened.
    """
    # A context depends on the items before it in the window, so each is a row of a rectangle.
    items = nn.utils.rnn.pad_sequence(list(windows), batch_first=True)
    context = context_vectors(head, items, item_texts)
    assert context is not None
    lengths = torch.tensor([len(window) for window in windows], device=items.device)
    return context[torch.arange(items.shape[1], device=items.device) < lengths[:, None]]


def user_vectors(
    head: Tensors,
    states: torch.Tensor,
    num_read: torch.Tensor,
    private_head: tuple[torch.Tensor, torch.Tensor] | None = None,
    context: torch.Tensor | None = None,
) -> torch.Tensor:
    """Project whitened states, and add the context of the items before.

    Args:
        head: One client's head parameters.
        states: float32 [P, d], whitened.
        num_read: int64 [P], how many items the layers have read at each.
        private_head: The private term's factors A [r, d] and B [D, r], B already weighted.
        context: float32 [P, D], from `context_vectors`.

    Returns:
        float32 [P, D].
    """
    vectors = states @ head[STATE_PROJ].T
    if private_head is not None:
        a, b = private_head
        vectors = vectors + (states @ a.T) @ b.T
    if STATE_LOG_N in head:
        vectors = vectors * trust(num_read[:, None], head[STATE_LOG_N])
    return vectors if context is None else vectors + context


def score_items(head: Tensors, vectors: torch.Tensor, item_texts: torch.Tensor) -> torch.Tensor:
    """Score the whole catalogue.

    The item projection is applied to the few users instead of the many items.

    Args:
        head: One client's head parameters.
        vectors: float32 [P, D] from `user_vectors`.
        item_texts: float32 [I, D], whitened text embeddings, the first D dimensions.

    Returns:
        float32 [P, I].
    """
    scores = inner_products(head, vectors, item_texts)
    return scores + head[ITEM_BIAS] if ITEM_BIAS in head else scores


def inner_products(head: Tensors, vectors: torch.Tensor, item_texts: torch.Tensor) -> torch.Tensor:
    """`score_items` without the item bias, float32 [P, I]: linear in the user vectors."""
    scores = (vectors @ head[ITEM_PROJ]) @ item_texts.T
    if ITEM_IDS in head:
        scores = scores + (vectors @ head[ITEM_IDS_OUT]) @ head[ITEM_IDS].T
    # With this factor the scores of random vectors start below one.
    return scores * (0.5 / item_texts.shape[1] ** 0.5)


def like_logits(head: Tensors, item_texts: torch.Tensor) -> torch.Tensor:
    """Log-odds, equal for all users, that a user likes each item, float32 [I].

    Args:
        head: One client's head parameters, with those of the task ``like``.
        item_texts: float32 [I, D], whitened.
    """
    logits = item_texts @ head[LIKE_TEXT] / item_texts.shape[1] ** 0.5
    if LIKE_IDS in head:
        ids = standard_ids(head[ITEM_IDS])
        logits = logits + ids @ head[LIKE_IDS] / ids.shape[1] ** 0.5
    return logits + head[LIKE_BIAS] if LIKE_BIAS in head else logits


def standard_ids(ids: torch.Tensor) -> torch.Tensor:
    """ID embeddings [I, E] as features: centred, of unit variance, and without a gradient.

    Only the next-item loss trains the embeddings; the likes and the private part use them as input.
    """
    ids = ids.detach()
    centred: torch.Tensor = (ids - ids.mean(0)) / ids.std().clamp_min(1e-6)
    return centred


def zero_shot_scores(states: torch.Tensor, item_texts: torch.Tensor) -> torch.Tensor:
    """Cosine of whitened user states [P, d] and item texts [I, D]; float32 [P, I]."""
    vectors = states[:, : item_texts.shape[1]]
    return F.normalize(vectors, dim=1) @ F.normalize(item_texts, dim=1).T
