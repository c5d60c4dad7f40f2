"""A mixture of EASE, which ignores the order of a history, and the Markov chain, which uses it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pfm_llm.base.errors import ConfigError
from pfm_llm.evaluation.baselines.common import Histories, ScoreMatrix, Scorer


class EaseMarkov:
    """A weighted sum of two fitted baselines' scores, each standardised per query.

    With z(s) = (s - mean(s)) / std(s) over the catalogue, a history scores
    weight · z(EASE) + (1 - weight) · z(Markov). Scores that are all alike (EASE of an empty
    history) become 0.

    Args:
        ease: A fitted `Ease`.
        markov: A fitted `MarkovRecency`, of the same catalogue.
        weight: The weight of EASE, in [0, 1].

    Raises:
        ConfigError: ``weight`` is out of range.
    """

    def __init__(self, ease: Scorer, markov: Scorer, weight: float) -> None:
        if not 0 <= weight <= 1:
            raise ConfigError(
                f"the weight of EASE beside Markov is {weight}; set it between 0 and 1"
            )
        self._ease = ease
        self._markov = markov
        self._weight = weight

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The weight, and the settings of the two baselines."""
        parts = {f"ease_{name}": value for name, value in self._ease.hyperparameters.items()}
        parts |= {f"markov_{name}": value for name, value in self._markov.hyperparameters.items()}
        return {"weight": self._weight, **parts}

    def score(self, histories: Histories) -> ScoreMatrix:
        """See `Scorer.score`."""
        return next(mixtures(self._ease, self._markov, [self._weight], histories))


def mixtures(
    ease: Scorer, markov: Scorer, weights: Sequence[float], histories: Histories
) -> Iterator[ScoreMatrix]:
    """The scores of `EaseMarkov` for several weights; each part scores once.

    Yields:
        Per weight float32 [queries, num_items].
    """
    whole, newest = _standardise(ease.score(histories)), _standardise(markov.score(histories))
    for weight in weights:
        yield (weight * whole + (1 - weight) * newest).astype(np.float32)


def _standardise(scores: ScoreMatrix) -> ScoreMatrix:
    centred = scores - scores.mean(axis=1, keepdims=True)
    spread = centred.std(axis=1, keepdims=True)
    flat = spread <= np.finfo(np.float32).eps * np.abs(scores).max(axis=1, keepdims=True)
    standard: ScoreMatrix = np.where(flat, 0, centred / np.where(flat, 1, spread))
    return standard
