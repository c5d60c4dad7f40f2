"""One user's recommendations: from a run, or from a published adapter, with a private part."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import with_setting
from pfm_llm.data.history import History
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.partition import Client
from pfm_llm.data.splits import TrainData
from pfm_llm.evaluation.new_places import NewPlaces
from pfm_llm.model.build import ModelParts, build_model
from pfm_llm.model.new_items import unmet_items
from pfm_llm.protocol.types import PrivateState, SharedState
from pfm_llm.publish import hub
from pfm_llm.publish.alignment import Alignment, start_from
from pfm_llm.publish.serving import Bases, load_catalogue, serving_config
from pfm_llm.recommender.serving import Served, StackedServing
from pfm_llm.runs.folders import CONFIG_FILE
from pfm_llm.runs.opening import open_to_serve
from pfm_llm.runs.run import Run, Trained, make_trainer

_ME = "user-me"
"""The client id under which `Recommender.personalise` keeps a private part."""


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


@dataclass(frozen=True)
class Owner:
    """The user whom a recommender is for.

    Attributes:
        history: All that the user met.
        private: Their private part; None where there is none.
    """

    history: History
    private: PrivateState | None


class Recommender:
    """Language model and shared adapter over a catalogue, for one user at a time.

    Make it with `from_pretrained`.

    Attributes:
        parts: The model.
        catalogue: The items that are ranked.
        alignment: How the catalogue fits the one that the adapter was trained on.
        owner: The user whom it is for; None: anybody who gives a history.
        serving: The same for many users in a pass.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        parts: ModelParts,
        catalogue: Catalogue,
        trained: Trained,
        alignment: Alignment,
        owner: Owner | None = None,
    ) -> None:
        self.parts = parts
        self.catalogue = catalogue
        self.alignment = alignment
        self.owner = owner
        self._config = config
        self._trained = trained
        self.serving = StackedServing(parts, trained)
        self._index = {item_id: index for index, item_id in enumerate(catalogue.item_ids)}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        user: str | None = None,
        catalogue: Catalogue | str | None = None,
        *,
        revision: str | None = None,
        **bases: Unpack[Bases],
    ) -> "Recommender":
        """Load a run's model, or a published adapter with its base model and a catalogue.

        Args:
            source: A run's folder, a folder that was exported or pulled, or a Hub id.
            user: The external id of a user of the run: the recommender then knows the user's
                history and private part. A published adapter knows no users.
            catalogue: Of a published adapter, the items to rank: a `Catalogue`, or what
                `sources.load_catalogue` takes. None: those it was trained on, where anybody can
                have them.
            revision: Commit, tag or branch of a Hub id.
            bases: Of a published adapter, ``backbone`` and ``item_encoder``: names, Hub ids or
                folders of the models that it stands on, where they are not as the manifest names
                them; and ``allow_base_mismatch``, to go on with other base weights. See `Bases`.

        Returns:
            The recommender. Its ``alignment`` says which items it knows from training.

        Raises:
            ConfigError: There is no such run, or the run was given what an adapter needs.
            CheckpointError: The run has no committed round.
            HubError: The adapter cannot be had.
            ArtefactError: It is not an adapter of ours, or stands on another base.
            CorruptFileError: A file is damaged, or is not what the manifest lists.
            DataError: The catalogue cannot be had, or the run has no such user.
        """
        if user is not None or (Path(source) / CONFIG_FILE).is_file():
            if catalogue or revision or any(bases.values()):
                raise ConfigError(
                    f"{source}: a run has a catalogue and a base model of its own; give catalogue, "
                    f"revision, {', '.join(Bases.__annotations__)} with a published adapter only"
                )
            run, trained, alignment = open_to_serve(Path(source))
            return cls.of_run(run, trained, user, alignment)
        artefact = hub.pull(str(source), revision)
        if not isinstance(catalogue, Catalogue):
            catalogue = load_catalogue(artefact, catalogue)
        config = serving_config(artefact, **bases)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ratings = np.empty(0) if artefact.prompt().uses_rating else None
        start, alignment = start_from(artefact, catalogue)
        parts = build_model(config, catalogue, ratings, device, start)
        shared = SharedState(parts.shared.tensors, artefact.manifest.round)
        trained = Trained(shared, config.adapters.private.weight)
        return cls(config, parts, catalogue, trained, alignment)

    @classmethod
    def of_run(
        cls,
        run: Run,
        trained: Trained,
        user: str | None = None,
        alignment: Alignment | None = None,
    ) -> "Recommender":
        """The recommender of a run that is open; see `from_pretrained`.

        Args:
            run: The run.
            trained: Its shared state, and the weight of private parts.
            user: As in `from_pretrained`.
            alignment: How its items fit those of the training; None: they are the same.

        Raises:
            DataError: The run's data have no such user.
        """
        catalogue = run.data.interactions.catalogue
        fit = alignment or Alignment.of_equal(len(catalogue))
        owner = None if user is None else _owner(run, trained.shared, user)
        return cls(run.config, run.model, catalogue, trained, fit, owner)

    def recommend(
        self,
        history: Sequence[str] | None = None,
        k: int = 10,
        *,
        ratings: Sequence[float] | None = None,
        private: PrivateState | None = None,
        private_weight: float | None = None,
        new_share: float | None = None,
    ) -> list[Recommendation]:
        """The best items that are not in a history.

        Args:
            history: External item ids, oldest first; None: the user's own history. After an empty
                one, items rank by their learned biases, and by a private part if one is given.
            k: How many.
            ratings: One per item of the history, where the prompt shows them.
            private: A private part, from `personalise` or `load_private`; None: that of the user
                whom the recommender is for.
            private_weight: Its weight, 0 (as if there were none) to 1.5; None: as it was set, or
                chosen, in training.
            new_share: The share of the places that new items have at least, 0 to 1; None: their
                share of the candidates. See `new_places`. An item is new when nobody in the
                federation has met it.

        Raises:
            DataError: An item is not in the catalogue, there is no history, or it is empty and the
                model has nothing to rank by.
            ConfigError: ``new_share`` is not in [0, 1].
            ArtefactError: The scores are not finite numbers.
        """
        places, shown = NewPlaces(new_share), self._history(history, ratings)
        scores = self._scores(shown, private, private_weight)
        best, values = places.top_items(scores, shown.items, k, self.is_new)
        titles = self.catalogue.fields["title"]
        return [
            Recommendation(self.catalogue.item_ids[i], titles[i], float(value))
            for i, value in zip(best.tolist(), values, strict=True)
        ]

    @functools.cached_property
    def is_new(self) -> np.ndarray:
        """Which items nobody in the federation has met, bool [I].

        Where the model has not learned that, they are the items that it was not trained on.
        """
        unmet = unmet_items(self._trained.shared.tensors, self.parts.codes)
        return self.alignment.new_items(unmet)

    def score(
        self,
        history: Sequence[str] | None = None,
        candidates: Sequence[str] | None = None,
        *,
        ratings: Sequence[float] | None = None,
        private: PrivateState | None = None,
        private_weight: float | None = None,
    ) -> np.ndarray:
        """Scores of items after a history, float32; see `recommend`.

        Args:
            history: As in `recommend`.
            candidates: External ids of the items to score; None: the whole catalogue, in its
                order.
            ratings: As in `recommend`.
            private: As in `recommend`.
            private_weight: As in `recommend`.
        """
        wanted = None if candidates is None else self.items(candidates)
        return self._scores(self._history(history, ratings), private, private_weight, wanted)

    def personalise(
        self,
        history: Sequence[str],
        folder: str | Path,
        *,
        ratings: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> PrivateState:
        """Fit a private part to the shared one, on a user's own history.

        Args:
            history: External item ids, oldest first. One will do where no text is learned from.
            folder: The user's private folder (it becomes 0700); the private part is kept there.
            ratings: One per item, where the prompt shows them.
            steps: Gradient steps; None: as many as before an evaluation.

        Raises:
            DataError: The history has no item, or a single one where a private part learns from
                the next item.
        """
        shown = self._history(history, ratings)
        private = self.parts.private
        if not len(shown):
            raise DataError("an empty history has nothing to learn from; give an item")
        if len(shown) < 2 and (private.takes_steps or private.reads_text):
            raise DataError("a history of one item has no next item to learn from; give two")
        store = PrivateStore(Path(folder))
        train = TrainData(Interactions.of_user(self.catalogue, "me", shown))
        histories = ClientHistories(
            [Client(_ME, (0,))], train, self.parts.encoder, self.serving.states
        )
        key = "federation.local.personalise_steps"
        if private.coefficients:
            key = "adapters.private.steps"
        config = self._config if steps is None else with_setting(self._config, key, steps)
        trainer = make_trainer(config, self.parts, histories, store)
        fitted = trainer.personalise([_ME], self._trained.shared)
        tensors = {name: value[0].cpu() for name, value in fitted.items()}
        state = PrivateState(_ME, self._trained.shared.round_number, tensors)
        store.save_personalised(state)
        return state

    def load_private(self, folder: str | Path, client_id: str | None = None) -> PrivateState | None:
        """A private part that is kept in a folder, or None where there is none.

        Args:
            folder: The folder that `personalise` was given, or a run's private folder.
            client_id: Whose, such as ``user-42``; None: what `personalise` kept, or the only
                client's.

        Raises:
            DataError: The folder has several clients, and none was named.
            CorruptFileError: The file is damaged.
        """
        store = PrivateStore(Path(folder))
        clients = store.client_ids()
        if client_id is None and clients:
            if _ME not in clients and len(clients) > 1:
                raise DataError(
                    f"{folder} has the private parts of {len(clients)} clients "
                    f"({', '.join(clients[:3])}, …); give client_id"
                )
            client_id = _ME if _ME in clients else clients[0]
        return None if client_id is None else store.serving(client_id)

    def export_private(self, folder: str | Path, private: PrivateState | None = None) -> None:
        """Write a private LoRA as a PEFT folder; see `DualAdapter.export_private`.

        Args:
            folder: The folder to write.
            private: A private part; None: that of the user whom the recommender is for.

        Raises:
            DataError: There is no private part.
            ConfigError: It has no LoRA on the layers of the language model.
        """
        private = private or getattr(self.owner, "private", None)
        if private is None:
            raise DataError("no private part to export; give one, or load a run with user=")
        own = {**self._trained.shared.tensors, **private.tensors}
        self.parts.export_private(own, self._trained.private_weight, Path(folder))

    def _history(
        self, history: Sequence[str] | None, ratings: Sequence[float] | None = None
    ) -> History:
        if history is not None:
            rated = None if ratings is None else np.asarray(ratings, dtype=np.float32)
            return History(self.items(history), rated)
        if self.owner is None:
            raise DataError("no history; give one, or load a run's recommender with user=")
        return self.owner.history

    def items(self, item_ids: Sequence[str]) -> np.ndarray:
        """Internal ids of items, int64 [n].

        Args:
            item_ids: External ids.

        Raises:
            DataError: An item is not in the catalogue.
        """
        item_ids = [str(item) for item in item_ids]  # ids that are numbers come from Python as ints
        unknown = [item for item in item_ids if item not in self._index]
        if unknown:
            there = ", ".join(self.catalogue.item_ids[:3])
            raise DataError(
                f"no item {unknown[0]!r} in the catalogue of {len(self.catalogue)} items "
                f"({there}, …); give ids of its items"
            )
        return np.array([self._index[item] for item in item_ids], dtype=np.int64)

    def _scores(
        self,
        shown: History,
        private: PrivateState | None,
        weight: float | None,
        candidates: np.ndarray | None = None,
    ) -> np.ndarray:
        if private is None and self.owner is not None:
            private = self.owner.private
        user = Served(shown, None if private is None else private.tensors)
        return self.serving.scores([user], weight, candidates)[0]


def _owner(run: Run, shared: SharedState, user: str) -> Owner:
    """A user of a run, with what the federation keeps for them."""
    interactions, clients = run.data.interactions, run.clients
    number = interactions.user(user)
    client_id = clients.histories.client_of(number)
    private = clients.store.serving(client_id, shared.round_number)
    return Owner(interactions.history_of(number), private)
