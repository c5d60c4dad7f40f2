"""A user embedding that the client computes at home, in item features that everybody learns.

A private LoRA that starts at random must learn its directions from one user's hundred events.
Here all clients learn the directions: item i has features v_i, and the client keeps the vector
phi alone, which adds ``phi . v_i`` to the score of item i. phi is a function of the history and of
the shared state: a new shared state makes no kept vector stale, few events give a small vector,
and no events give zero. phi is found in one of two ways.

*Read*, for the next item where items have IDs. The items of the history are summed up, as in FISM
(Kabbur, Ning and Karypis 2013, KDD, equation 4) with a fading past::

    phi = sum_t w_t a_{y_t} / (n + sum_t w_t),    v_i = b_i        [r]

with a_i and b_i two embeddings of each item, learned for this alone. A quarter of the features each
fades at a pace of its own, from a few events to hundreds. The vector reads the whole history, also
the items before the windows that are trained on. In training it has dropout at a rate of its own,
or the embeddings would remember which user met an item.

*Fitted* (`fits` has the equations), for likes, and for the next item by text alone::

    v_i = T z_i + G e_i [+ f_i]    [r], z_i its whitened text, e_i its standardised ID embedding

with r free numbers f_i of an item for likes, where items have IDs, and a feature 1 for the user's
own level of likes. A basis that is learned from so few likes is largely chance: M of them start and
are learned apart, each has a fit of its own, and their logits are averaged. In training, likes are
fitted to the windows of the batch, and in serving to all rated items.

Training is *prequential* (Dawid 1984): each position is predicted with the phi of earlier positions
alone; where phi is fitted, with that of all positions before its block. The loss then measures how
well a vector of the past predicts the user's future, at every length of past. With phi fitted to
the positions that it predicts, the features would learn to remember the past. CAVIA (Zintgraf et
al. 2019, arXiv 1810.03642, equations 2 and 3) also fits private parameters anew for each task,
inside the training of the shared ones.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from pfm_llm.base import seeding
from pfm_llm.config.choices import ItemIds, Task
from pfm_llm.config.model import HeadConfig, TasteConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.head import ITEM_IDS, item_width, standard_ids
from pfm_llm.model.outputs import SharedView
from pfm_llm.model.private.fits import blocks, fit_likes, fit_next_item, past_weights
from pfm_llm.model.private.part import PrivatePart
from pfm_llm.protocol.parameters import Parameter, Sizes, Unseen
from pfm_llm.protocol.types import Tensors

LIKE_FITS = 4
"""M, the fits for likes."""
BLOCK = 8
"""Positions that one fitted vector predicts at once in training."""
_PRECISION = 30.0
_HALF_LIFE, _HALF_LIFE_LIKE = 20.0, 100.0
_READ_EVENTS = 5.0
_READ_HALF_LIVES = (4.0, 15.0, 60.0, 240.0)
"""Before training: lambda; h in events, of the next item and of likes, which drift slowly; n."""
_RATE, _RATE_ITEMS = 1e-2, 3e-2
_RATE_LIKE, _RATE_LIKE_ITEMS = 3e-3, 1e-2
"""The server's learning rates, for the next item and for likes, which overfit sooner."""
_FEATURE_STD, _READ_STD = 0.3, 0.1
_LEVEL_PRECISION = 1.0
"""Prior on a user's level of likes: one unit of log-odds."""
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


class UserEmbedding(PrivatePart):
    """The kind ``taste``: one private vector for each task."""

    @property
    def reads_text(self) -> bool:
        """Whether the next-item vector is fitted to scores, which need the language model."""
        return not self._is_read

    @property
    def _is_read(self) -> bool:
        return is_read(self.settings.taste, Task.NEXT_ITEM, self.config.head)

    def shared_parameters(self) -> list[Parameter]:
        """Features, priors and half-lives; see `basis_parameters`."""
        return basis_parameters(self.config, self.sizes)

    def initial(self, client_id: str) -> dict[str, torch.Tensor]:
        """Zero vectors, the same for every client."""
        return {vector_name(task): torch.zeros(self._width(task)) for task in self.config.tasks}

    def past_scores(self, view: SharedView) -> torch.Tensor:
        """The vector of each position's past times the features of the catalogue, [K, I]."""
        own, outputs = view.own, view.outputs
        features = item_features(own, Task.NEXT_ITEM, view.texts)
        if self._is_read:
            read, kept = outputs.read, outputs.kept_private
            if read is None:
                read = read_vectors(own, outputs.met)[outputs.known]
            return (read if kept is None else read * kept) @ features.T
        block = blocks(len(outputs.targets), BLOCK).to(outputs.targets.device)
        past = past_weights(block, half_life(own, Task.NEXT_ITEM))
        prior = prior_precisions(own, Task.NEXT_ITEM)
        fitted = fit_next_item(view.fixed_scores, outputs.targets, features, prior, past)
        return fitted[block] @ features.T

    def past_likes(self, view: SharedView) -> torch.Tensor:
        """Each fit's vector of the past times the features of the rated items, [M, R]."""
        own, rated = view.own, view.rated
        features = item_features(own, Task.LIKE, view.texts)[rated.items]
        block = blocks(len(rated.where), BLOCK).to(rated.where.device)
        past = past_weights(block, half_life(own, Task.LIKE))[:, rated.where]
        prior = prior_precisions(own, Task.LIKE)
        fitted = fit_likes(rated.logits.detach(), rated.liked, features, prior, past)
        return (fitted[:, block[rated.where]] * features.transpose(0, 1)).sum(2)

    def dropout_width(self, own: Tensors) -> int:
        """The width of a vector that is read; a fitted vector has no dropout."""
        return own[READ_IN].shape[1] if self._is_read else 0

    def fit(self, view: SharedView) -> dict[str, torch.Tensor]:
        """The vectors, fitted to all outputs; a vector that is read needs no user vectors."""
        own, outputs = view.own, view.outputs
        one_block = torch.zeros_like(outputs.targets)
        if self._is_read:
            found = read_vectors(own, outputs.met)
        else:
            features = item_features(own, Task.NEXT_ITEM, view.texts)
            past = past_weights(one_block, half_life(own, Task.NEXT_ITEM))[-1:]
            prior = prior_precisions(own, Task.NEXT_ITEM)
            found = fit_next_item(view.fixed_scores, outputs.targets, features, prior, past)
        vectors = {vector_name(Task.NEXT_ITEM): found[-1]}
        if Task.LIKE in self.config.tasks:
            rated = view.rated
            features = item_features(own, Task.LIKE, view.texts)[rated.items]
            past = past_weights(one_block, half_life(own, Task.LIKE))[-1:, rated.where]
            prior = prior_precisions(own, Task.LIKE)
            fitted = fit_likes(rated.logits, rated.liked, features, prior, past)
            vectors[vector_name(Task.LIKE)] = fitted[:, 0].flatten() / len(fitted)
        return vectors

    def added_scores(
        self,
        own: Tensors,
        task: Task,
        texts: torch.Tensor,
        weight: float,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The client's vector times the features of the catalogue."""
        vector = own.get(vector_name(task))
        if vector is None:
            return None
        return item_features(own, task, texts).flatten(1) @ (vector * weight)

    def _width(self, task: Task) -> int:
        settings = self.settings.taste
        if task is Task.LIKE:
            return LIKE_FITS * (settings.like_rank + 1)
        return settings.read_rank if self._is_read else settings.rank


def is_read(config: TasteConfig, task: Task, head: HeadConfig) -> bool:
    """Whether a task's vector is read from the history instead of fitted to it."""
    has_ids = head.item_ids is not ItemIds.NONE
    return task is Task.NEXT_ITEM and has_ids and bool(config.read_rank)


def basis_parameters(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    """The tensors of the basis; each task has a basis of its own.

    The basis has its own loss, so ``lr_scale`` does not apply to its learning rates.

    Args:
        config: Private adapter, head, tasks and seed.
        sizes: The size of the catalogue.
    """
    found = []
    for task in config.tasks:
        is_one_read = is_read(config.adapters.private.taste, task, config.head)
        found += _read_basis(config, sizes) if is_one_read else _fitted_basis(config, sizes, task)
    return found


def _read_basis(config: ExperimentConfig, sizes: Sizes) -> list[Parameter]:
    rank = config.adapters.private.taste.read_rank
    shape = (sizes.num_items, rank)

    def draw() -> torch.Tensor:
        generator = seeding.generator(config.seed, f"taste/{Task.NEXT_ITEM}")
        return torch.randn(shape, generator=generator) * _READ_STD

    return [
        Parameter(READ_IN, shape, _RATE_ITEMS, draw, per_item=True),
        Parameter(READ_OUT, shape, _RATE_ITEMS, per_item=True, unseen=Unseen.MEAN),
        *pace_parameters(READ_PRIOR, half_life_name(Task.NEXT_ITEM)),
    ]


def pace_parameters(priors: str, half_lives: str) -> list[Parameter]:
    """The logarithms of n and of h of `fading_means`, under these names."""
    paces = torch.tensor(_READ_HALF_LIVES)
    return [
        Parameter(priors, tuple(paces.shape), _RATE, torch.full_like(paces, _READ_EVENTS).log),
        Parameter(half_lives, tuple(paces.shape), _RATE, paces.log),
    ]


def _fitted_basis(config: ExperimentConfig, sizes: Sizes, task: Task) -> list[Parameter]:
    taste, dim = config.adapters.private.taste, config.head.dim
    rank: tuple[int, ...] = (taste.rank,)
    rate, half_life = _RATE, _HALF_LIFE
    if likes := task is Task.LIKE:
        rank = (LIKE_FITS, taste.like_rank)
        rate, half_life = _RATE_LIKE, _HALF_LIFE_LIKE
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
            shape = (sizes.num_items, *rank)
            found.append(Parameter(LIKE_FEATURES, shape, _RATE_LIKE_ITEMS, per_item=True))
    logs = {precision_name(task): _PRECISION, half_life_name(task): half_life}
    for name, value in logs.items():
        found.append(Parameter(name, (1,), rate, partial(torch.tensor, [math.log(value)])))
    return found


def item_features(shared: Tensors, task: Task, item_texts: torch.Tensor) -> torch.Tensor:
    """Features of the whole catalogue; for likes, with the constant 1 as the last one of each fit.

    The ID embeddings are inputs here: this use sends no gradient to them.

    Args:
        shared: One client's shared tensors.
        task: The task whose basis is used.
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


def half_life(shared: Tensors, task: Task) -> torch.Tensor:
    """h, float32, in events: [1], or [4] where a vector is read."""
    return shared[half_life_name(task)].exp()


def read_vectors(shared: Tensors, items: torch.Tensor) -> torch.Tensor:
    """Vectors for the next item, read from the history of one user.

    Args:
        shared: One client's shared tensors.
        items: int64 [K], the history, oldest first.

    Returns:
        float32 [K + 1, r]: row t has the items before t, the last row all of them.
    """
    embeddings = F.embedding(items, shared[READ_IN])
    return fading_means(embeddings, half_life(shared, Task.NEXT_ITEM), shared[READ_PRIOR].exp())


def fading_means(
    embeddings: torch.Tensor, half_lives: torch.Tensor, priors: torch.Tensor
) -> torch.Tensor:
    """Means of every past of a history, in which older items have less weight.

    Args:
        embeddings: float32 [K, r], of the items of the history, oldest first.
        half_lives: float32 [P], in items; each is that of a P-th of the r numbers.
        priors: float32 [P], n of each, in items: w of weight count w / (w + n).

    Returns:
        float32 [K + 1, r], see `read_vectors`.
    """
    each = torch.arange(len(embeddings), device=embeddings.device)
    parts = embeddings.tensor_split(len(half_lives), dim=1)
    read = []
    for part, pace, prior in zip(parts, half_lives, priors, strict=True):
        weights = past_weights(each, pace)
        read.append(weights @ part / (weights.sum(1, keepdim=True) + prior))
    return torch.cat(read, 1)
