"""Private vectors in closed form: the weights of a past, and Newton steps of penalised losses.

With w_t = 2^(-a_t / h) for an event that is a_t events old and a half-life of h events, a vector
is the minimum, to a few Newton steps from zero, of the client's own loss with a Gaussian prior::

    phi = argmin  sum_t w_t loss(s_t + V phi, y_t) + lambda/2 |phi|^2,    s_t the shared scores

For the next item the loss is the softmax cross-entropy over the items that are not in the history
by then, with one step::

    g = sum_t w_t (v_{y_t} - E_{p_t} v),    H = sum_t w_t Cov_{p_t}(v) + lambda I,    phi = H^-1 g

and for likes it is the logistic loss, with two steps. The closed form is the Laplace approximation.
"""

import torch

from pfm_llm.model.head import fading

_LIKE_STEPS = 2


def blocks(num_positions: int, size: int) -> torch.Tensor:
    """The block of each position, int64 [K]: ``size`` neighbours are predicted together."""
    return torch.arange(num_positions) // size


def past_weights(block: torch.Tensor, half_life: torch.Tensor) -> torch.Tensor:
    """The weight of each position in the fits that predict the blocks, and in the fit to all.

    Args:
        block: int64 [K], ascending.
        half_life: float32, in positions.

    Returns:
        float32 [F + 1, K]: row f weighs the positions before block f and is zero elsewhere; the
        last row weighs all positions. The newest position of a row has weight one.
    """
    num_positions = len(block)
    place = torch.arange(num_positions, device=block.device)
    starts = torch.nonzero(torch.diff(block, prepend=block.new_full((1,), -1)))[:, 0]
    ends = torch.cat([starts, starts.new_full((1,), num_positions)])
    return fading(ends[:, None] - 1 - place, half_life)


def fit_next_item(
    scores: torch.Tensor,
    targets: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Vectors for the softmax loss, one for each row of weights.

    Args:
        scores: float32 [K, I], shared scores at each position.
        targets: int64 [K].
        features: float32 [I, r].
        precisions: float32 [r].
        weights: float32 [F, K], from `past_weights`.

    Returns:
        float32 [F, r]; zero where all weights of a row are zero.
    """
    probabilities = scores.softmax(1)
    means = probabilities @ features
    gradient = weights @ (features[targets] - means)
    # The covariance of the features, E v v' - E v E v', summed over the positions.
    second = (weights @ probabilities) @ _products(features) - weights @ _products(means)
    return _newton_step(gradient, second, precisions)


def fit_likes(
    logits: torch.Tensor,
    liked: torch.Tensor,
    features: torch.Tensor,
    precisions: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Vectors for the logistic loss, one for each row of weights.

    Args:
        logits: float32 [K], shared log-odds of each rated item.
        liked: float32 [K], 0 or 1.
        features: float32 [K, M, r + 1], of the rated items.
        precisions: float32 [r + 1].
        weights: float32 [F, K], from `past_weights`.

    Returns:
        float32 [M, F, r + 1]; zero where all weights of a row are zero.
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
    """One step up the penalised likelihood: gradient [.., r], the data's curvature [.., r * r]."""
    hessian = second.unflatten(-1, (gradient.shape[-1], -1)) + torch.diag(precisions)
    step: torch.Tensor = torch.linalg.solve(hessian, gradient)
    return step


def _products(rows: torch.Tensor) -> torch.Tensor:
    """The outer product of each row with itself, [.., r] to [.., r * r]."""
    return (rows[..., :, None] * rows[..., None, :]).flatten(-2)
