"""Ranks of held-out items as whoever pulls a published adapter gets them, and of yardsticks."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pfm_llm.base.progress import Progress
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import scoring
from pfm_llm.evaluation.baselines.popularity import Popularity
from pfm_llm.model.items.vectors import item_states
from pfm_llm.model.items.whitening import fit_normaliser
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.publish.staging import stage
from pfm_llm.recommender import Recommender
from pfm_llm.runs.publication import request_of
from pfm_llm.runs.run import Corpus

SHARED, PERSONAL = "shared", "personal"
"""By the shared part alone; and with a private part that is fitted to the history at home."""

Ranks = Mapping[str, list[int]]
"""Per way of serving the rank of the target of each query, from 1."""


def published(run: Path, folder: Path) -> Path:
    """The checked copy of a run's adapter that a push sends; an earlier copy is replaced."""
    request = request_of(run, "someone/adapter")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return stage(request.exported, folder, request.private_root).folder


def served(
    adapter: Path, items: Path, data: Corpus, what: str, ways: Sequence[str] = (PERSONAL, SHARED)
) -> Ranks:
    """Ranks of the targets on test, from a published folder and a file of item texts.

    Args:
        adapter: The folder; nothing else is known of the training.
        items: The file.
        data: The users whose held-out items are ranked.
        what: For the progress bar.
        ways: The ways of serving.
    """
    model = Recommender.from_pretrained(adapter, catalogue=str(items))
    asked, ids = data.split.test, data.interactions.catalogue.item_ids
    found: dict[str, list[int]] = {way: [] for way in ways}
    with (
        tempfile.TemporaryDirectory() as home,
        Progress(len(asked.users), what, unit="users") as progress,
    ):
        for history, targets in zip(asked.histories, asked.targets, strict=True):
            shown = [ids[item] for item in history.tolist()]
            for way, ranks in found.items():
                private = model.personalise(shown, home) if way == PERSONAL else None
                scores = model.score(shown, ids, private=private)
                ranks += scoring.full_ranks(scores[None], [history], [targets]).tolist()
            progress.update()
    return found


def yardsticks(adapter: Path, items: Path, data: Corpus) -> dict[str, list[int]]:
    """Ranks of the targets without a trained model.

    ``popularity`` counts the training events of the target world, which an adapter from elsewhere
    does not know. ``cosine`` is that of an item's text vector with the mean of the history's, and
    ``cosine_whitened`` the same after a whitening that is fitted to the texts of the target world.

    Args:
        adapter: A published folder, which names the encoder of items.
        items: The file of item texts.
        data: See `served`.
    """
    train, asked = data.split.train.interactions, data.split.test
    counts = Popularity().fit(
        [train.history(user) for user in range(train.num_users)], len(train.catalogue)
    )
    model = Recommender.from_pretrained(adapter, catalogue=str(items))
    order = [model.catalogue.item_ids.index(item) for item in train.catalogue.item_ids]
    states = item_states(
        read_artefact(adapter).manifest.items, model.parts.backbone, model.parts.encoder
    )
    raw = states.items[order]
    found = {"popularity": _ranked(asked, lambda history: counts.score([history])[0])}
    for name, vectors in (("cosine", raw), ("cosine_whitened", fit_normaliser(raw)(raw))):
        found[name] = _ranked(asked, _cosine_with(F.normalize(vectors, dim=1)))
    return found


def _cosine_with(texts: torch.Tensor) -> Callable[[np.ndarray], np.ndarray]:
    def score(history: np.ndarray) -> np.ndarray:
        mean = texts[torch.from_numpy(history).long()].mean(0)
        found: np.ndarray = (texts @ F.normalize(mean, dim=0)).numpy()
        return found

    return score


def _ranked(asked: HeldOut, score: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    found: list[int] = []
    for history, targets in zip(asked.histories, asked.targets, strict=True):
        found += scoring.full_ranks(score(history)[None], [history], [targets]).tolist()
    return found
