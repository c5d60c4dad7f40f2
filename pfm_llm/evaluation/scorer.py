"""Scoring a catalogue after histories: the one chain by which we rank, serve and recommend.

The newest window of a history gives trunk states, these give a user vector, and the user vector
gives the scores of the items. A private part adds to these scores.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pfm_llm.client.trunk_cache import TrunkStates
from pfm_llm.data.history import History
from pfm_llm.model.batches import ChunkBatch, collate, stacked_tensors
from pfm_llm.model.cohort import CohortModel, Parts
from pfm_llm.protocol.types import Mode, SharedState, Tensors
from pfm_llm.text.encoding import HistoryEncoder, Window

Histories = Mapping[str, Sequence[History]]
"""Per client id the histories after which items are scored."""

UserVectors = dict[tuple[tuple[str, ...], bool], list[torch.Tensor]]
"""User vectors [Q, D] per client that `Scorer.score` has read out. A key has the clients that were
scored together, and whether the shared LoRA was active. The vectors are valid for one set of
histories and one shared state."""


class Scorer:
    """Scores the catalogue after histories of many clients, in one pass.

    Args:
        model: The many-clients model.
        encoder: Renders histories.
        states: Trunk states of windows: from a cache, or computed each time.

    Attributes:
        model: As given.
    """

    def __init__(self, model: CohortModel, encoder: HistoryEncoder, states: TrunkStates) -> None:
        self.model = model
        self._encoder = encoder
        self._states = states

    def window(self, history: History) -> Window:
        """The newest window of a history, as the language model reads it.

        Raises:
            DataError: The history is empty.
        """
        return self._encoder.query_window(history)

    def stack(self, shared: SharedState, private: Tensors, num_clients: int) -> Tensors:
        """Shared tensors repeated per client (no copy) beside stacked private ones [C, ...]."""
        device = self.model.item_texts.device
        own = {name: value.to(device) for name, value in private.items()}
        return stacked_tensors(shared.tensors, num_clients, device) | own

    def score(
        self,
        histories: Histories,
        stacked: Tensors,
        modes: Mapping[Mode, Parts | None],
        candidates: np.ndarray | None = None,
        known: UserVectors | None = None,
    ) -> dict[Mode, np.ndarray]:
        """Score items after histories.

        Args:
            histories: Of C clients, Q histories in all, none empty.
            stacked: The clients' tensors [C, ...], from `stack`.
            modes: Per mode which adapters take part; None: the language model without adapters.
            candidates: Internal ids of the items to score, int [K]; None: the whole catalogue.
            known: User vectors that earlier calls have read out. This call adds its own, so that
                other private parts for the same histories need no second pass.

        Returns:
            Per mode float32 [Q, K], the histories by client in their order.
        """
        batch = functools.cache(lambda: self._collate(histories))
        known = {} if known is None else known
        scores = {}
        for mode, parts in modes.items():
            if parts is None:
                found = self.model.zero_shot_scores(batch())
            else:
                vectors = self._vectors(tuple(histories), batch, stacked, parts, known)
                found = self.model.score_vectors(vectors, stacked, parts)
            of_catalogue = found.cpu().numpy()
            scores[mode] = of_catalogue if candidates is None else of_catalogue[:, candidates]
        return scores

    def _vectors(
        self,
        clients: tuple[str, ...],
        batch: Callable[[], ChunkBatch],
        stacked: Tensors,
        parts: Parts,
        known: UserVectors,
    ) -> list[torch.Tensor]:
        """User vectors per client. Vectors that no private part changes are read out once."""
        if self.model.objective.private.acts_on_states:
            return self.model.user_vectors(batch(), stacked, parts)
        key = (clients, parts.shared_lora)
        if key not in known:
            known[key] = self.model.user_vectors(batch(), stacked, parts)
        return known[key]

    def _collate(self, histories: Histories) -> ChunkBatch:
        windows = [[self.window(history) for history in own] for own in histories.values()]
        # Each window has its own cache entry, which stays when other windows of the client change.
        states = [
            [self._states([window], client_id)[0] for window in own]
            for client_id, own in zip(histories, windows, strict=True)
        ]
        return collate(windows, states, last_only=True)
