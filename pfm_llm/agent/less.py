"""Less like this: items that are similar to one go down in a list, by a stated rule.

The *similarity* of two items is the sum of two cosines, that of their whitened texts and that of
the vectors that the federation has learned for them, each standardised over the catalogue. Where
nothing is learned of items, it is the first alone. Of either alone, the first takes films for
similar that share a word of the title, and the second those that the same people watched at the
same time (docs/log). The *neighbours* of an item are the n most similar ones, a fiftieth of the
catalogue and at least twenty. With s the standard deviation of the scores of the candidates, the
neighbour at place p loses

    strength * 4 s * (1 - p / 2n),      p = 0 for the most similar,

so that the most similar one loses most, and the last one half as much. All other scores stay.
"""

import numpy as np
import torch
import torch.nn.functional as F

REACH = 0.02
"""Share of the catalogue that is similar to an item."""
LEAST = 20
_DEVIATIONS = 4.0


class Similarity:
    """Which items are similar to an item.

    Args:
        texts: float [I, D], whitened texts.
        learned: float [I, E], learned vectors of items; None: there are none.
    """

    def __init__(self, texts: torch.Tensor, learned: torch.Tensor | None = None) -> None:
        found = [texts] if learned is None else [texts, learned]
        self._vectors = [F.normalize(one.detach().float().cpu(), dim=1) for one in found]
        self._num_items = len(texts)

    def neighbours(self, item: int) -> list[int]:
        """The items that are similar to one, the most similar first."""
        number = min(max(LEAST, round(REACH * self._num_items)), self._num_items - 1)
        if number < 1:
            return []
        similarity = torch.zeros(self._num_items)
        for vectors in self._vectors:
            cosines = vectors @ vectors[item]
            similarity += (cosines - cosines.mean()) / cosines.std().clamp_min(1e-12)
        similarity[item] = -torch.inf
        found: list[int] = similarity.topk(number).indices.tolist()
        return found

    def lowered(
        self, scores: np.ndarray, unwanted: list[int], strength: float, candidates: np.ndarray
    ) -> np.ndarray:
        """Scores [I] after the rule; an item that is similar to several falls by the most of them.

        Args:
            scores: float [I].
            unwanted: The items of which the user wants less.
            strength: 0, nothing changes, to 1.
            candidates: bool [I], the items that may be shown.
        """
        if not unwanted or not strength or not candidates.any():
            return scores
        fall = np.zeros(len(scores))
        for item in unwanted:
            near = self.neighbours(item)
            falls = 1 - np.arange(len(near)) / (2 * len(near))
            fall[near] = np.maximum(fall[near], falls)
        spread = float(scores[candidates].std())
        return scores - strength * _DEVIATIONS * spread * fall
