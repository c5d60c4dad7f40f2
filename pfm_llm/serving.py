"""A user's recommendations from a run: backbone + shared + private, where the user's data is."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pfm_llm import evaluation, scoring
from pfm_llm.assembly import Assembly, RunFolders, assemble, load_corpus
from pfm_llm.cohort_model import collate
from pfm_llm.config import load_config
from pfm_llm.errors import DataError
from pfm_llm.experiment import load_shared
from pfm_llm.processes import start_processes
from pfm_llm.run_report import CONFIG_FILE
from pfm_llm.types import Mode, SharedState


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: The catalogue's external id.
        title: Its text.
        score: Higher is better; comparable within one list only.
    """

    item_id: str
    title: str
    score: float


class RunRecommender:
    """Recommends to the users of a run.

    Args:
        run: The run's folder.

    Raises:
        CheckpointError: The run has no committed round.
    """

    def __init__(self, run: Path) -> None:
        config = load_config(run / CONFIG_FILE)
        processes = start_processes(config.runtime.threads)
        folders = RunFolders.of(run)
        self._assembly: Assembly = assemble(config, load_corpus(config), folders, processes)
        self._shared: SharedState
        self._shared, self._round = load_shared(self._assembly, folders)

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
        window = self._assembly.encoder.query_window(items, interactions.ratings_of(user))
        client_id = self._assembly.histories.client_of(user)
        states = self._assembly.cache.states([window], client_id)
        batch = collate([[window]], [states], last_only=True)
        private = self._private(client_id)
        mode = Mode.SHARED_PRIVATE if private else Mode.SHARED_ONLY
        parts = evaluation.parts_of([mode], self._assembly.config.adapters.private.weight)[mode]
        assert parts is not None
        stacked = self._assembly.trainer.stack(self._shared, private, 1)
        scores = self._assembly.model.scores(batch, stacked, parts)[0].cpu().numpy()
        best, values = scoring.top_items(scores, items, n)
        catalogue = interactions.catalogue
        return [
            Recommendation(catalogue.item_ids[i], catalogue.fields["title"][i], float(value))
            for i, value in zip(best.tolist(), values, strict=True)
        ]

    def _private(self, client_id: str) -> dict[str, torch.Tensor]:
        store = self._assembly.store
        state = store.load_personalised(client_id) or store.load(client_id, at_most=self._round)
        if state is None:
            return {}
        device = self._assembly.model.item_texts.device
        return {name: value[None].to(device) for name, value in state.tensors.items()}
