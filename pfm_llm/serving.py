"""A user's recommendations from a run: backbone + shared + private, where the user's data is."""

from pathlib import Path

import torch

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation import evaluator
from pfm_llm.model.batches import collate
from pfm_llm.protocol.types import Mode
from pfm_llm.recommender import Recommendation, best_items
from pfm_llm.runs.experiment import open_run


class RunRecommender:
    """Recommends to the users of a run.

    Args:
        run: The run's folder.

    Raises:
        CheckpointError: The run has no committed round.
    """

    def __init__(self, run: Path) -> None:
        opened = open_run(run)
        self._assembly = opened.assembly
        self._shared = opened.shared

    def recommend(self, user_id: str, n: int = 10) -> list[Recommendation]:
        """The best unseen items for a user after their whole history.

        Args:
            user_id: The external id of a user of the run's data.
            n: How many.

        Raises:
            DataError: There is no such user, or they have no history.
        """
        interactions = self._assembly.corpus.interactions
        try:
            user = interactions.user_ids.index(user_id)
        except ValueError:
            first = ", ".join(interactions.user_ids[:3])
            raise DataError(f"no user {user_id!r} in the data; users are {first}, …") from None
        items = interactions.history(user)
        window = self._assembly.parts.encoder.query_window(interactions.history_of(user))
        client_id = self._assembly.histories.client_of(user)
        states = self._assembly.cache.states([window], client_id)
        batch = collate([[window]], [states], last_only=True)
        private = self._private(client_id)
        mode = Mode.SHARED_PRIVATE if private else Mode.SHARED_ONLY
        parts = evaluator.parts_of([mode], self._assembly.config.adapters.private.weight)[mode]
        assert parts is not None
        stacked = self._assembly.trainer.stack(self._shared, private, 1)
        scores = self._assembly.parts.model.scores(batch, stacked, parts)[0].cpu().numpy()
        return best_items(scores, items, interactions.catalogue, n)

    def _private(self, client_id: str) -> dict[str, torch.Tensor]:
        store = self._assembly.store
        state = store.load_personalised(client_id) or store.load(
            client_id, at_most=self._shared.round_number
        )
        if state is None:
            return {}
        device = self._assembly.parts.model.item_texts.device
        return {name: value[None].to(device) for name, value in state.tensors.items()}
