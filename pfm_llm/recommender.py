"""A published shared adapter at work: recommend, personalise, without the run that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfm_llm.base.errors import ArtefactError, DataError
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.client.trunk_cache import TrunkCache, trunk_states
from pfm_llm.config.schema import ExperimentConfig, InitFromConfig, parse_config
from pfm_llm.data import sources
from pfm_llm.data.history import History
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.partition import partition
from pfm_llm.data.splits import TrainData
from pfm_llm.evaluation import evaluator, scoring
from pfm_llm.model.batches import collate
from pfm_llm.model.build import ModelParts, build_model
from pfm_llm.model.cohort import Parts
from pfm_llm.protocol.types import Mode, PrivateState, SharedState
from pfm_llm.publish import hub
from pfm_llm.publish.alignment import start_from
from pfm_llm.publish.artefact import Artefact, prompt_file
from pfm_llm.runs.run import make_trainer

_USER = "me"


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


def best_items(
    scores: np.ndarray, seen: np.ndarray, catalogue: Catalogue, n: int
) -> list[Recommendation]:
    """The best unseen items with their texts.

    Args:
        scores: float [I].
        seen: Internal ids to leave out.
        catalogue: The items.
        n: How many.
    """
    best, values = scoring.top_items(scores, seen, n)
    return [
        Recommendation(catalogue.item_ids[i], catalogue.fields["title"][i], float(value))
        for i, value in zip(best.tolist(), values, strict=True)
    ]


class RecommenderModel:
    """Backbone and shared adapter over a catalogue, for one user at a time.

    Make it with `from_pretrained`.

    Attributes:
        artefact: The published adapter.
        catalogue: The items that are ranked.
        parts: The model.
        alignment: How the catalogue fits the one that the adapter was trained on.
    """

    def __init__(self, artefact: Artefact, catalogue: Catalogue, config: ExperimentConfig) -> None:
        self.artefact = artefact
        self.catalogue = catalogue
        self._config = config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ratings = np.empty(0) if artefact.prompt().uses_rating else None
        start, self.alignment = start_from(artefact, catalogue)
        self.parts: ModelParts = build_model(config, catalogue, ratings, device, start)
        self._index = {item_id: index for index, item_id in enumerate(catalogue.item_ids)}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        catalogue: Catalogue | str | None = None,
        *,
        revision: str | None = None,
        backbone: str | None = None,
        allow_base_mismatch: bool = False,
    ) -> "RecommenderModel":
        """Load a published adapter, its base model, and a catalogue.

        Args:
            source: Hub id, or a folder that was exported or pulled.
            catalogue: The items to rank: a `Catalogue`, or what `sources.load_catalogue` takes.
                None: those it was trained on, where anybody can have them.
            revision: Commit, tag or branch of a Hub id.
            backbone: Name, Hub id or folder of the base model; None: as the manifest names it.
            allow_base_mismatch: Go on although the base weights are others.

        Returns:
            The model. ``model.alignment`` says which items it knows from training.

        Raises:
            HubError: The adapter cannot be had.
            ArtefactError: It is not an adapter of ours, or stands on another base.
            CorruptFileError: A file is not what the manifest lists.
            DataError: The catalogue cannot be had.
        """
        artefact = hub.pull(str(source), revision)
        if not isinstance(catalogue, Catalogue):
            catalogue = _load_catalogue(artefact, catalogue)
        config = _config_of(artefact, backbone, allow_base_mismatch)
        return cls(artefact, catalogue, config)

    def recommend(
        self,
        history: Sequence[str],
        n: int = 10,
        *,
        ratings: Sequence[float] | None = None,
        private: PrivateState | None = None,
        private_weight: float | None = None,
    ) -> list[Recommendation]:
        """The best items that are not in a history.

        Args:
            history: External item ids, oldest first, at least one.
            n: How many.
            ratings: One per item of the history, where the prompt shows them.
            private: The user's own adapter, from `personalise`.
            private_weight: Its weight, 0 to 1.5; None: the config's.

        Raises:
            DataError: An item is not in the catalogue, or the history is empty.
        """
        items = self._items(history)
        scores = self.score(history, ratings=ratings, private=private, weight=private_weight)
        return best_items(scores, items, self.catalogue, n)

    def score(
        self,
        history: Sequence[str],
        *,
        ratings: Sequence[float] | None = None,
        private: PrivateState | None = None,
        weight: float | None = None,
    ) -> np.ndarray:
        """Scores of the whole catalogue after a history, float32 [I]; see `recommend`."""
        shown = History(self._items(history), _as_floats(ratings))
        window = self.parts.encoder.query_window(shown)
        states = trunk_states(self.parts.trunk, [window])
        batch = collate([[window]], [states], last_only=True)
        tensors = {} if private is None else dict(private.tensors)
        device = self.parts.model.item_texts.device
        stacked = {
            name: value[None].to(device)
            for name, value in {**self.parts.shared.tensors, **tensors}.items()
        }
        weight = self._config.adapters.private.weight if weight is None else weight
        scores = self.parts.model.scores(batch, stacked, _parts(private is not None, weight))
        return scores[0].cpu().numpy()

    def personalise(
        self,
        history: Sequence[str],
        folder: str | Path,
        *,
        ratings: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> PrivateState:
        """Fit a private adapter for a user to the shared one, on their own history.

        Args:
            history: External item ids, oldest first. One will do where a taste is read off it.
            folder: The user's private folder (it becomes 0700); the adapter is kept there.
            ratings: One per item, where the prompt shows them.
            steps: Gradient steps; None: as many as before an evaluation.

        Raises:
            DataError: The history has no item, or a single one where a private part learns from
                the next item.
        """
        items = self._items(history)
        if not len(items):
            raise DataError("an empty history has nothing to learn from; give an item")
        private = self.parts.private
        if len(items) < 2 and (private.takes_steps or private.reads_text):
            raise DataError("a history of one item has no next item to learn from; give two")
        interactions = Interactions(
            catalogue=self.catalogue,
            user_ids=(_USER,),
            offsets=np.array([0, len(items)]),
            items=items.astype(np.int32),
            timestamps=None,
            ratings=_as_floats(ratings),
            user_fields={},
        )
        trainer, client_id, store = self._trainer(interactions, Path(folder), steps)
        round_number = self.artefact.manifest.round
        shared = SharedState(self.parts.shared.tensors, round_number)
        fitted = trainer.personalise([client_id], shared)
        tensors = {name: value[0].cpu() for name, value in fitted.items()}
        state = PrivateState(client_id, round_number, tensors)
        store.save_personalised(state)
        return state

    def load_private(self, folder: str | Path) -> PrivateState | None:
        """The private adapter that `personalise` kept in a folder, or None."""
        return PrivateStore(Path(folder)).load_personalised(f"user-{_USER}")

    def _trainer(
        self, interactions: Interactions, folder: Path, steps: int | None
    ) -> tuple[LocalTrainer, str, PrivateStore]:
        config, parts = self._config, self.parts
        if steps is not None:
            local = config.federation.local.model_copy(update={"personalise_steps": steps})
            federation = config.federation.model_copy(update={"local": local})
            config = config.model_copy(update={"federation": federation})
        store = PrivateStore(folder)
        clients = partition(interactions, 1, config.seed)
        # A single user's states are computed when they are needed, and not kept.
        cache = TrunkCache(parts.trunk, folder / "clients", "", max_bytes=0)
        histories = ClientHistories(clients, TrainData(interactions), parts.encoder, cache.states)
        return make_trainer(config, parts, histories, store), clients[0].client_id, store

    def _items(self, history: Sequence[str]) -> np.ndarray:
        unknown = [item for item in history if item not in self._index]
        if unknown:
            there = ", ".join(self.catalogue.item_ids[:3])
            raise DataError(
                f"no item {unknown[0]!r} in the catalogue of {len(self.catalogue)} items "
                f"({there}, …); give ids of its items"
            )
        return np.array([self._index[item] for item in history], dtype=np.int64)


def _load_catalogue(artefact: Artefact, source: str | None) -> Catalogue:
    trained_on = artefact.manifest.data_source
    if source is None and trained_on not in sources.EMBEDDED_SOURCES:
        raise DataError(
            f"{artefact.origin} was trained on {trained_on!r}, whose items are not in its folder; "
            "pass catalogue: a CSV, TSV or Parquet file with item_id and title"
        )
    return sources.load_catalogue(source or trained_on)


def _config_of(
    artefact: Artefact, backbone: str | None, allow_base_mismatch: bool
) -> ExperimentConfig:
    """The config under which the adapter's tensors have their meaning."""
    manifest = artefact.manifest
    name = backbone or manifest.base.embedded or manifest.base.name
    if name == manifest.base.name and "/" not in name and not Path(name).exists():
        raise ArtefactError(
            f"{artefact.origin} was trained on a local model called {name!r}; pass backbone: the "
            "folder or Hub id of that model"
        )
    revision = None if backbone else manifest.base.revision
    started = InitFromConfig(adapter=artefact.origin, allow_base_mismatch=allow_base_mismatch)
    tree: Mapping[str, Any] = {
        "name": manifest.name,
        "method": "custom",
        "prompt": str(artefact.folder / prompt_file(manifest.prompt)),
        "window": manifest.window.model_dump(mode="json"),
        "adapters": manifest.adapters.model_dump(mode="json"),
        "head": manifest.head.model_dump(mode="json"),
        "tasks": [task.value for task in manifest.tasks],
        "data": {"split": "last_fraction"},  # no data are split here; likes allow no other
        "backbone": {"name": name, "revision": revision, "dtype": manifest.base.dtype.value},
        "init_from": started.model_dump(mode="json"),
        # A basis is not trained here, so any schedule does; this one goes with every kind.
        "federation": {"local": {"schedule": "alternate"}},
    }
    return parse_config(dict(tree), origin=artefact.origin)


def _parts(has_private: bool, weight: float) -> Parts:
    mode = Mode.SHARED_PRIVATE if has_private else Mode.SHARED_ONLY
    parts = evaluator.parts_of([mode], weight)[mode]
    assert parts is not None
    return parts


def _as_floats(ratings: Sequence[float] | None) -> np.ndarray | None:
    return None if ratings is None else np.asarray(ratings, dtype=np.float32)
