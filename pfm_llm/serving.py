"""A user's recommendations from a run: backbone + shared + private, where the user's data is."""

from pathlib import Path

import torch

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation import evaluator
from pfm_llm.evaluation.results import judged_mode
from pfm_llm.model.batches import collate
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
        self._run, self._trained = open_run(run)

    def recommend(self, user_id: str, n: int = 10) -> list[Recommendation]:
        """The best unseen items for a user after their whole history.

        Args:
            user_id: The external id of a user of the run's data.
            n: How many.

        Raises:
            DataError: There is no such user, or they have no history.
        """
        run = self._run
        interactions, clients = run.data.interactions, run.clients
        try:
            user = interactions.user_ids.index(user_id)
        except ValueError:
            first = ", ".join(interactions.user_ids[:3])
            raise DataError(f"no user {user_id!r} in the data; users are {first}, …") from None
        items = interactions.history(user)
        window = run.model.encoder.query_window(interactions.history_of(user))
        client_id = clients.histories.client_of(user)
        states = clients.cache.states([window], client_id)
        batch = collate([[window]], [states], last_only=True)
        private = self._private(client_id)
        mode = judged_mode(bool(private))
        parts = evaluator.parts_of([mode], self._trained.private_weight)[mode]
        assert parts is not None
        stacked = run.scorer.stack(self._trained.shared, private, 1)
        scores = run.model.model.scores(batch, stacked, parts)[0].cpu().numpy()
        return best_items(scores, items, interactions.catalogue, n)

    def _private(self, client_id: str) -> dict[str, torch.Tensor]:
        store = self._run.clients.store
        state = store.load_personalised(client_id) or store.load(
            client_id, at_most=self._trained.shared.round_number
        )
        if state is None:
            return {}
        device = self._run.processes.device
        return {name: value[None].to(device) for name, value in state.tensors.items()}
