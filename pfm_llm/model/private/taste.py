"""The private taste vector: a few numbers of a user, in a basis that everybody learns.

A random private LoRA must learn its directions from one user's hundred events. Here directions
are the business of all: item i has features v_i, and the client keeps phi alone, which adds
``phi . v_i`` to the score of item i. phi is a function of the history and of the shared state:
nothing is lost when a new shared state arrives, little data shrink it to zero, and no data are
zero. It is found in one of two ways.

*Read*, for the next item where items have IDs. What was met is summed up, as in FISM (Kabbur,
Ning and Karypis 2013, KDD, equation 4) with a fading past:

    phi = sum_t w_t a_{y_t} / (n + sum_t w_t),    v_i = b_i        [r]

with a_i and b_i two embeddings of each item, learned for this alone. A quarter of the features each
fades at a pace of its own, from a few events to hundreds. It reads all of a history, also what
comes before the windows that are trained on; the prompt shows the newest. In training it has
dropout at a rate of its own, lest the embeddings remember who met an item.

*Fitted*, for likes, and for the next item by text alone:

    v_i = T z_i + G e_i [+ f_i]    [r], z_i its whitened text, e_i its standardised ID embedding

with r free numbers f_i of an item for likes, where items have IDs. phi is the minimum, to a few
Newton steps from zero, of the client's own loss with a Gaussian prior:

    phi = argmin  sum_t w_t loss(s_t + V phi, y_t) + lambda/2 |phi|^2,    s_t the shared scores

For the next item the loss is the softmax cross-entropy over what was not met by then, with one
step,

    g = sum_t w_t (v_{y_t} - E_{p_t} v),    H = sum_t w_t Cov_{p_t}(v) + lambda I,    phi = H^-1 g

and for likes the logistic loss, with a feature 1 added for the user's own level. Much in a basis
that is learned from so few likes is chance: M of them start and are learned apart, each has a fit
of its own, and their logits are averaged. In training likes see the windows at hand, and in serving
all that was rated.

In both, w_t = 2^(-a_t / h) for an event that is a_t events old and h a learned half-life: tastes
drift, and what was met last tells most.

Training is *prequential* (Dawid 1984): each position is predicted with the phi of earlier ones
alone; where phi is fitted, with that of all before its block. The basis then receives the
gradient of what generalises from a user's past to the user's future, as serving will ask of it,
and from every amount of past: fitted in-sample it would learn to remember, and fitted to long
histories alone the prior would never see what little data are worth. That private parameters are
fitted anew per task inside of the training of the shared ones is CAVIA (Zintgraf et al. 2019,
arXiv 1810.03642, equations 2 and 3); the closed form is the Laplace approximation.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from pfm_llm.base import seeding
from pfm_llm.config.choices import ItemIds, Task
from pfm_llm.config.model import HeadConfig, PrivateAdapterConfig, TasteConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.head import ITEM_IDS, fading, item_width, standard_ids
from pfm_llm.protocol.parameters import Parameter, Sizes, Unseen
from pfm_llm.protocol.types import Tensors

_FEATURE_STD = 0.3
_LEVEL_PRECISION = 1.0
"""Prior on a user's level of likes: one unit of log-odds."""
_LIKE_STEPS = 2
_READ_STD = 0.1
_READ_HALF_LIVES = (4.0, 15.0, 60.0, 240.0)
READ_IN, READ_OUT = "basis.taste.next_item.read_in", "basis.taste.next_item.read_out"
"""Names of all a_i and of all b_i, [I, r]."""
READ_PRIOR = "basis.taste.next_item.log_events"
"""Name of log n, n in events, one a pace, [4]."""
LIKE_FEATURES = "basis.taste.like.items"
"""Name of all f_m,i, [I, M, r]."""


def text_name(task: Task) -> str:
    """Name of T, [r, D]; for likes of all T_m, [M, r, D]."""
    return f"basis.taste.{task}.text"


def ids_name(task: Task) -> str:
    """Name of G, [r, E]; for likes of all G_m, [M, r, E]."""
    return f"basis.taste.{task}.ids"


def precision_name(task: Task) -> str:
    """Name of log lambda, [1]."""
    return f"basis.taste.{task}.log_precision"


def half_life_name(task: Task) -> str:
    """Name of log h, h in events: [1], or [4] where a vector is read."""
    return f"basis.taste.{task}.log_half_life"


def vector_name(task: Task) -> str:
    """Name of phi, [r]; for likes of all phi_m / M, [M (r + 1)], the level last in each."""
    return f"private.taste.{task}"


def is_read(config: TasteConfig, task: Task, head: HeadConfig) -> bool:
    """Whether a task's vector is read off the history instead of fitted to it."""
    has_ids = head.item_ids is not ItemIds.NONE
    return task is Task.NEXT_ITEM and has_ids and bool(config.read_rank)


def needs_no_text(private: PrivateAdapterConfig, head: HeadConfig) -> bool:
    """Whether all that is private follows from what was met, be it one item, without a pass."""
    return private.is_taste and is_read(private.taste, Task.NEXT_ITEM, head)


def basis_parameters(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    """The tensors of the basis; each task has a basis of its own.

    They have a loss of their own, so that ``lr_scale`` does not apply to them.

    Args:
        config: Taste, head, tasks, seed and the server's learning rates.
        sizes: Of the catalogue.
    """
    found = []
    for task in config.tasks:
        is_one_read = is_read(config.adapters.private.taste, task, config.head)
        found += _read_basis(config, sizes) if is_one_read else _fitted_basis(config, sizes, task)
    return found


def _read_basis(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    taste, server = config.adapters.private.taste, config.federation.server
    shape, paces = (sizes.num_items, taste.read_rank), (len(_READ_HALF_LIVES),)
    events, half_lives = torch.full(paces, taste.read_events), torch.tensor(_READ_HALF_LIVES)

    def draw() -> torch.Tensor:
        generator = seeding.generator(config.seed, f"taste/{Task.NEXT_ITEM}")
        return torch.randn(shape, generator=generator) * _READ_STD

    rate, item_rate = server.lr_taste, server.lr_taste_items
    return [
        Parameter(READ_IN, shape, item_rate, draw, per_item=True),
        Parameter(READ_OUT, shape, item_rate, per_item=True, unseen=Unseen.MEAN),
        Parameter(READ_PRIOR, paces, rate, events.log),
        Parameter(half_life_name(Task.NEXT_ITEM), paces, rate, half_lives.log),
    ]


def _fitted_basis(config: ExperimentConfig, sizes: Sizes, task: Task) -> list[Parameter]:
    taste, server, dim = config.adapters.private.taste, config.federation.server, config.head.dim
    rank: tuple[int, ...] = (taste.rank,)
    rate, half_life = server.lr_taste, taste.half_life
    if likes := task is Task.LIKE:
        rank, rate = (taste.like_fits, taste.like_rank), server.lr_taste_like
        half_life = taste.half_life_like
    width = item_width(config.head)

    def draw(part: slice) -> torch.Tensor:
        # T and G are parts of one draw.
        generator = seeding.generator(config.seed, f"taste/{task}")
        drawn = torch.randn(*rank, width, generator=generator) * _FEATURE_STD / width**0.5
        return drawn[..., part].clone()

    found = [Parameter(text_name(task), (*rank, dim), rate, partial(draw, slice(0, dim)))]
    if config.head.item_ids is not ItemIds.NONE:
        ids = partial(draw, slice(dim, width))
        found.append(Parameter(ids_name(task), (*rank, width - dim), rate, ids))
        if likes:
            shape, item_rate = (sizes.num_items, *rank), server.lr_taste_like_items
            found.append(Parameter(LIKE_FEATURES, shape, item_rate, per_item=True))
    logs = {precision_name(task): taste.precision, half_life_name(task): half_life}
    for name, value in logs.items():
        found.append(Parameter(name, (1,), rate, partial(torch.tensor, [math.log(value)])))
    return found


def initial_vectors(
    config: TasteConfig, tasks: tuple[Task, ...], head: HeadConfig
) -> dict[str, torch.Tensor]:
    """A client's vectors before anything was met: zero, float32."""

    def width(task: Task) -> int:
        if task is Task.LIKE:
            return config.like_fits * (config.like_rank + 1)
        return config.read_rank if is_read(config, task, head) else config.rank

    return {vector_name(task): torch.zeros(width(task)) for task in tasks}


def item_features(shared: Tensors, task: Task, item_texts: torch.Tensor) -> torch.Tensor:
    """Features of the whole catalogue; for likes, with the constant 1 as the last one of each fit.

    The ID embeddings are read as they are: this use of them sends no gradient to them.

    Args:
        shared: One client's shared tensors.
        task: Whose basis.
        item_texts: float32 [I, D], whitened.

    Returns:
        float32 [I, r], or [I, M, r + 1].
    """
    if task is Task.NEXT_ITEM and READ_OUT in shared:
        return shared[READ_OUT]
    features = _projected(item_texts, shared[text_name(task)])
    if ids_name(task) in shared:
        features = features + _projected(standard_ids(shared[ITEM_IDS]), shared[ids_name(task)])
    if task is Task.LIKE:
        if LIKE_FEATURES in shared:
            features = features + shared[LIKE_FEATURES]
        features = F.pad(features, (0, 1), value=1.0)
    return features


def _projected(items: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Items [I, E] times each row of a matrix [..., E]: [I, ...]."""
    return (items @ matrix.flatten(0, -2).T).unflatten(1, matrix.shape[:-1])


def prior_precisions(shared: Tensors, task: Task) -> torch.Tensor:
    """Diagonal of the prior's precision matrix of a fit, float32 [r] or [r + 1]."""
    rank = shared[text_name(task)].shape[-2]
    precisions = shared[precision_name(task)].exp().expand(rank)
    if task is Task.LIKE:
        precisions = torch.cat([precisions, precisions.new_full((1,), _LEVEL_PRECISION)])
    return precisions


def blocks(num_positions: int, size: int) -> torch.Tensor:
    """The block of each position, int64 [K]: ``size`` neighbours are predicted together."""
    return torch.arange(num_positions) // size


def past_weights(shared: Tensors, task: Task, block: torch.Tensor) -> torch.Tensor:
    """What each position counts in the fits that predict the blocks, and in that to all.

    Args:
        shared: For the half-life.
        task: Whose.
        block: int64 [K], ascending.

    Returns:
        float32 [F + 1, K]: row f has the positions before block f, zero elsewhere; the last row
        has all. The newest position of a row counts one.
    """
    return _fading_past(block, shared[half_life_name(task)].exp())


def _fading_past(block: torch.Tensor, half_life: torch.Tensor) -> torch.Tensor:
    num_positions = len(block)
    place = torch.arange(num_positions, device=block.device)
    starts = torch.nonzero(torch.diff(block, prepend=block.new_full((1,), -1)))[:, 0]
    ends = torch.cat([starts, starts.new_full((1,), num_positions)])
    return fading(ends[:, None] - 1 - place, half_life)


def read_vectors(shared: Tensors, items: torch.Tensor) -> torch.Tensor:
    """Taste vectors for the next item, read off what was met.

    Args:
        shared: One client's shared tensors.
        items: int64 [K], what was met, oldest first; of one user.

    Returns:
        float32 [K + 1, r]: row t has the items before t, the last row all of them.
    """
    half_lives, priors = (
        shared[name].exp() for name in (half_life_name(Task.NEXT_ITEM), READ_PRIOR)
    )
    each = torch.arange(len(items), device=items.device)
    parts = F.embedding(items, shared[READ_IN]).tensor_split(len(half_lives), dim=1)
    read = []
    for part, half_life, prior in zip(parts, half_lives, priors, strict=True):
        weights = _fading_past(each, half_life)
        read.append(weights @ part / (weights.sum(1, keepdim=True) + prior))
    return torch.cat(read, 1)


def fit_next_item(
    scores: torch.Tensor,
    targets: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Taste vectors for the softmax loss, one for each way to weigh the positions.

    Args:
        scores: float32 [K, I], shared scores at each position.
        targets: int64 [K].
        features: float32 [I, r].
        precisions: float32 [r].
        weights: float32 [F, K], from `past_weights`.

    Returns:
        float32 [F, r]; zero where all weights are.
    """
    probabilities = scores.softmax(1)
    means = probabilities @ features
    gradient = weights @ (features[targets] - means)
    # Of the products of two features: E v v' - E v E v', summed over the positions.
    second = (weights @ probabilities) @ _products(features) - weights @ _products(means)
    return _newton_step(gradient, second, precisions)


def fit_likes(
    logits: torch.Tensor,
    liked: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Taste vectors for the logistic loss, one for each way to weigh the rated items.

    Args:
        logits: float32 [K], shared log-odds of each rated item.
        liked: float32 [K], 0 or 1.
        features: float32 [K, M, r + 1], of the rated items.
        precisions: float32 [r + 1].
        weights: float32 [F, K], from `past_weights`.

    Returns:
        float32 [M, F, r + 1]; zero where all weights are.
    """
    features = features.transpose(0, 1)
    vectors = features.new_zeros(len(features), len(weights), features.shape[2])
    products = _products(features)
    for _ in range(_LIKE_STEPS):
        odds = torch.sigmoid(logits + vectors @ features.mT)
        second = (weights * odds * (1 - odds)) @ products
        gradient = (weights * (liked - odds)) @ features - precisions * vectors
        vectors = vectors + _newton_step(gradient, second, precisions)
    return vectors


def _newton_step(
    gradient: torch.Tensor, second: torch.Tensor, precisions: torch.Tensor
) -> torch.Tensor:
    """Up the penalised likelihood: gradient [.., r], its curvature [.., r * r] but the prior's."""
    hessian = second.unflatten(-1, (gradient.shape[-1], -1)) + torch.diag(precisions)
    step: torch.Tensor = torch.linalg.solve(hessian, gradient)
    return step


def _products(rows: torch.Tensor) -> torch.Tensor:
    """The outer product of each row with itself, [.., r] to [.., r * r]."""
    return (rows[..., :, None] * rows[..., None, :]).flatten(-2)
