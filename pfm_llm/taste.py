"""The private taste vector: a few numbers of a user, in a basis that everybody learns.

A random private LoRA must learn its directions from one user's hundred events. Here directions
are the business of all: item i has the features

    v_i = T z_i + G e_i        [r], z_i its whitened text, e_i its standardised ID embedding

and the client keeps phi alone, which adds ``phi . v_i`` to the score of item i. phi is the
minimum, to a few Newton steps from zero, of the client's own loss with a Gaussian prior:

    phi = argmin  sum_t loss(s_t + V phi, y_t) + lambda/2 |phi|^2,    s_t the shared scores

so it is a function of the history and of the shared state: nothing is lost when a new shared
state arrives, little data shrink it to zero, and no data are zero. For the next item the loss is
the softmax cross-entropy over the catalogue, with one step,

    g = sum_t (v_{y_t} - E_{p_t} v),    H = sum_t Cov_{p_t}(v) + lambda I,    phi = H^-1 g

and for likes the logistic loss, with a feature 1 added for the user's own level.

Training is *cross-fitted*: the positions are cut into folds, and each fold is predicted with the
phi of all others. T, G and lambda then receive the gradient of what generalises from a part of a
history to the rest; fitted in-sample, they would learn to remember. That private parameters are
fitted anew per task inside of the training of the shared ones is CAVIA (Zintgraf et al. 2019,
arXiv 1810.03642, equations 2 and 3); the closed form is the Laplace approximation.
"""

import math

import torch

from pfm_llm import seeding
from pfm_llm.choices import ItemIds, Task
from pfm_llm.config import HeadConfig, TasteConfig
from pfm_llm.head import ITEM_IDS, standard_ids
from pfm_llm.types import Tensors

_FEATURE_STD = 0.3
_LEVEL_PRECISION = 1.0
"""Prior on a user's level of likes: one unit of log-odds."""
_LIKE_STEPS = 2


def text_name(task: Task) -> str:
    """Name of T, [r, D]."""
    return f"basis.taste.{task}.text"


def ids_name(task: Task) -> str:
    """Name of G, [r, E]."""
    return f"basis.taste.{task}.ids"


def precision_name(task: Task) -> str:
    """Name of log lambda, [1]."""
    return f"basis.taste.{task}.log_precision"


def vector_name(task: Task) -> str:
    """Name of phi, [r]; for likes [r + 1], the level last."""
    return f"private.taste.{task}"


def initial_basis(
    config: TasteConfig, tasks: tuple[Task, ...], head: HeadConfig, seed: int
) -> dict[str, torch.Tensor]:
    """The basis before training, float32.

    Args:
        config: Number of features and prior.
        tasks: What is predicted; each task has a basis of its own.
        head: For the dimensions D of the texts and E of the item IDs, if there are any.
        seed: The experiment's seed.
    """
    dim = head.dim
    has_ids = head.item_ids is not ItemIds.NONE
    width = dim + (head.id_dim if has_ids else 0)
    tensors = {}
    for task in tasks:
        generator = seeding.generator(seed, f"taste/{task}")
        drawn = torch.randn(config.rank, width, generator=generator) * _FEATURE_STD / width**0.5
        tensors[text_name(task)] = drawn[:, :dim].clone()
        if has_ids:
            tensors[ids_name(task)] = drawn[:, dim:].clone()
        tensors[precision_name(task)] = torch.tensor([math.log(config.precision)])
    return tensors


def initial_vectors(config: TasteConfig, tasks: tuple[Task, ...]) -> dict[str, torch.Tensor]:
    """A client's vectors before it is fitted: zero, float32."""
    return {vector_name(task): torch.zeros(config.rank + (task is Task.LIKE)) for task in tasks}


def item_features(shared: Tensors, task: Task, item_texts: torch.Tensor) -> torch.Tensor:
    """Features of the whole catalogue; for likes, with the constant 1 as the last one.

    The ID embeddings are read as they are: this use of them sends no gradient to them.

    Args:
        shared: One client's shared tensors.
        task: Whose basis.
        item_texts: float32 [I, D], whitened.

    Returns:
        float32 [I, r], or [I, r + 1].
    """
    features = item_texts @ shared[text_name(task)].T
    if ids_name(task) in shared:
        features = features + standard_ids(shared[ITEM_IDS]) @ shared[ids_name(task)].T
    if task is Task.LIKE:
        features = torch.cat([features, torch.ones(len(features), 1).to(features)], 1)
    return features


def prior_precisions(shared: Tensors, task: Task) -> torch.Tensor:
    """Diagonal of the prior's precision matrix, float32 [r] or [r + 1]."""
    rank = len(shared[text_name(task)])
    precisions = shared[precision_name(task)].exp().expand(rank)
    if task is Task.LIKE:
        precisions = torch.cat([precisions, precisions.new_full((1,), _LEVEL_PRECISION)])
    return precisions


def folds(num_positions: int, num_folds: int) -> torch.Tensor:
    """The fold of each position: contiguous blocks, int64 [K].

    Neighbours are alike (a session, a box of films), so random folds would let a position be
    predicted from its twin.
    """
    return (torch.arange(num_positions) * min(num_folds, num_positions)).div(
        max(num_positions, 1), rounding_mode="floor"
    )


def fit_next_item(
    scores: torch.Tensor,
    targets: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    fold: torch.Tensor,
) -> torch.Tensor:
    """Taste vectors for the softmax loss, each fitted to all folds but one.

    Args:
        scores: float32 [K, I], shared scores at each position.
        targets: int64 [K].
        features: float32 [I, r].
        precisions: float32 [r].
        fold: int64 [K], 0 to F - 1.

    Returns:
        float32 [F + 1, r]: row f is fitted without fold f, the last row to everything.
    """
    if not len(fold):
        return features.new_zeros(1, features.shape[1])
    probabilities = scores.softmax(1)
    means = probabilities @ features
    residuals = features[targets] - means
    gradients, curvatures = [], []
    for f in range(int(fold.max()) + 1):
        own = fold == f
        second = features.T @ (probabilities[own].sum(0)[:, None] * features)
        curvatures.append(second - means[own].T @ means[own])
        gradients.append(residuals[own].sum(0))
    gradient, curvature = torch.stack(gradients), torch.stack(curvatures)
    zero = torch.zeros_like(gradient[:1]), torch.zeros_like(curvature[:1])
    without = gradient.sum(0) - torch.cat([gradient, zero[0]])
    hessian = curvature.sum(0) - torch.cat([curvature, zero[1]]) + torch.diag(precisions)
    fitted: torch.Tensor = torch.linalg.solve(hessian, without)
    return fitted


def fit_likes(
    logits: torch.Tensor,
    liked: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    fold: torch.Tensor,
) -> torch.Tensor:
    """Taste vectors for the logistic loss, each fitted to all folds but one.

    Args:
        logits: float32 [K], shared log-odds of each rated item.
        liked: float32 [K], 0 or 1.
        features: float32 [K, r + 1], of the rated items.
        precisions: float32 [r + 1].
        fold: int64 [K], 0 to F - 1.

    Returns:
        float32 [F + 1, r + 1]: row f is fitted without fold f, the last row to everything.
    """
    num_folds = int(fold.max()) + 1 if len(fold) else 0
    rows = torch.arange(num_folds + 1, device=fold.device)
    used = (fold[None, :] != rows[:, None]).to(logits)
    vectors = features.new_zeros(num_folds + 1, features.shape[1])
    for _ in range(_LIKE_STEPS):
        odds = torch.sigmoid(logits + vectors @ features.T)
        weights = used * odds * (1 - odds)
        hessian = torch.einsum("fk,kr,kq->frq", weights, features, features)
        gradient = (used * (liked - odds)) @ features - precisions * vectors
        vectors = vectors + torch.linalg.solve(hessian + torch.diag(precisions), gradient)
    return vectors
