"""Attacks of an observer who follows the protocol: which items, and whose updates?

**Items.** Rows of an item table get a gradient where the item was met, and none elsewhere (Melis et
al. 2019, arXiv 1805.04049, for words; Yuan et al. 2023, arXiv 2301.10964, for items of a federated
recommender). A bias gets ``softmax - one-hot``, so what rises was a target. Where no tensor has a
row for each item, the change of a projection of item texts is a sum of products with those texts,
and its length along a text tells whether that text is in the sum.

**Membership in a cohort.** The observer knows the shared state, makes the update of a suspect's
history, and compares it with the sum (Melis et al. 2019). The score is the cosine of both, after
the mean update was taken off both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from pfm_llm.audit.view import View
from pfm_llm.model.head import ITEM_BIAS, ITEM_IDS, ITEM_MET, ITEM_PROJ
from pfm_llm.model.private.taste import READ_IN
from pfm_llm.protocol.types import ClientUpdate, Tensors


def _rises(change: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return change.clamp(min=0)


def _row_norms(change: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(change, dim=1)


def _along_texts(change: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(texts.to(change.dtype) @ change.T, dim=1)


READERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ITEM_MET: _rises,
    READ_IN: _row_norms,
    ITEM_BIAS: _rises,
    ITEM_IDS: _row_norms,
    ITEM_PROJ: _along_texts,
}
"""Tensor to what reads items off its change: (change, item texts [I, D]) to scores [I], at least 0.
A score of 0 says that the item was not met."""


def item_scores(tensors: Tensors, texts: torch.Tensor) -> dict[str, np.ndarray]:
    """By each reader that there is something to read for, the score of each item.

    Args:
        tensors: A change of the shared state.
        texts: Whitened item texts, float32 [I, D].

    Returns:
        Tensor to float64 [I].
    """
    found = {}
    for name, read in READERS.items():
        change = tensors.get(name)
        # With codes a row belongs to several items, and only texts are read.
        if change is None or (name != ITEM_PROJ and len(change) != len(texts)):
            continue
        scores = read(change.double(), texts)
        if bool(scores.any()):
            found[name] = scores.numpy()
    return found


def read_items(scores: np.ndarray, most: int) -> np.ndarray:
    """The items that an observer takes for met: those with the largest scores above 0.

    Args:
        scores: float64 [I].
        most: How many at most, such as the stated number of examples and one for each client.
    """
    order = np.argsort(-scores, kind="stable")[:most]
    return order[scores[order] > 0]


class Suspects:
    """Clients of which an observer knows the history, and can make the update.

    Args:
        updates: The update that each would send.

    Attributes:
        client_ids: The clients, in the order of scores.
    """

    def __init__(self, updates: Mapping[str, ClientUpdate]) -> None:
        self.client_ids = tuple(updates)
        first = next(iter(updates.values()))
        self._names = tuple(first.delta)
        rows = torch.stack([_flat(update.delta, self._names) for update in updates.values()])
        self._mean = rows.mean(0)
        self._directions = torch.nn.functional.normalize(rows.sub_(self._mean), dim=1)

    def scores(self, view: View, num_clients: int) -> np.ndarray:
        """How like each suspect's update a view is, float64 [suspects].

        Args:
            view: A message, a sum, or what was released.
            num_clients: How many updates are in it.
        """
        seen = _flat(view.tensors, self._names) - num_clients * self._mean
        along = self._directions @ torch.nn.functional.normalize(seen, dim=0)
        return along.double().numpy()

    def are_in(self, view: View) -> np.ndarray:
        """Which of them took part, bool [suspects]."""
        return np.array([client_id in view.members for client_id in self.client_ids])


def _flat(tensors: Tensors, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().float() for name in names])


def union(histories: Mapping[str, frozenset[int]], members: Iterable[str]) -> frozenset[int]:
    """The items that any of some clients has met."""
    return frozenset().union(*(histories[client_id] for client_id in members))
