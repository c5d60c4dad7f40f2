"""The personal agent: recommendations for one user, with reasons, under the user's control."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from pfm_llm.agent.actions import Action, Event, Kind, Known
from pfm_llm.agent.beliefs import Account, Beliefs, believe
from pfm_llm.agent.folder import AgentFolder, Settings
from pfm_llm.agent.less import Similarity
from pfm_llm.agent.ranking import Ranking, places
from pfm_llm.agent.reasons import Explanation, explain
from pfm_llm.agent.sync import Check, check, check_fits
from pfm_llm.base import files
from pfm_llm.base.errors import DataError
from pfm_llm.data.interactions import TITLE, Catalogue
from pfm_llm.evaluation.new_places import NewPlaces
from pfm_llm.publish import hub
from pfm_llm.publish.serving import Bases
from pfm_llm.recommender import Recommender

FEEDBACK = (Kind.LIKE, Kind.DISLIKE, Kind.SEEN, Kind.LESS_LIKE_THIS, Kind.NOT_NOW)


@dataclass(frozen=True)
class Suggestion:
    """An item that the agent recommends.

    Attributes:
        item_id: External id.
        title: Its text.
        fields: Its other texts, such as year and genres.
        place: Its place in the list, from 1.
        place_shared: Its place among the same candidates by the shared part alone.
        own: How much the private part raises its log-probability; below 0: it lowers it.
    """

    item_id: str
    title: str
    fields: Mapping[str, str]
    place: int
    place_shared: int
    own: float


class PersonalAgent:
    """Recommends for one user, and does what the user says. It works without a network.

    All that it knows of the user is in ``folder``. The user's private part follows from the events
    that count, is computed when it is needed, and is not kept: without an event it is, bit for bit,
    what it would have been if the event had never happened.

    Args:
        model: The recommender; its private part must follow from a history without steps.
        folder: The user's folder.
        clock: The time, in seconds since 1970.

    Attributes:
        model: As given.

    Raises:
        ConfigError: The recommender's private part is trained by steps.
        StorageError: The folder cannot be made.
    """

    def __init__(
        self, model: Recommender, folder: str | Path, clock: Callable[[], float] = time.time
    ) -> None:
        check_fits(model)
        self.model = model
        self._folder = AgentFolder(Path(folder))
        self._clock = clock
        self._ranking = Ranking(model)

    @classmethod
    def open(
        cls, folder: str | Path, catalogue: Catalogue | str | None = None, **bases: Unpack[Bases]
    ) -> "PersonalAgent":
        """The agent of a folder, with the adapter that its newest `sync` has kept.

        Args:
            folder: The user's folder.
            catalogue: As in `Recommender.from_pretrained`.
            bases: As there.

        Raises:
            DataError: No adapter has been fetched yet.
        """
        found = AgentFolder(Path(folder)).adapters()
        if not found:
            raise DataError(f"{folder} has no adapter yet; give one, and sync() keeps it there")
        return cls(Recommender.from_pretrained(found[0], catalogue=catalogue, **bases), folder)

    # What the agent knows

    @property
    def folder(self) -> Path:
        """The user's folder."""
        return self._folder.path

    @property
    def known(self) -> Known:
        """What the agent knows of its user."""
        return Known.of(self._folder.actions())

    @property
    def settings(self) -> Settings:
        """What the user has set."""
        return self._folder.settings()

    def ledger(self) -> list[dict[str, Any]]:
        """What came and went: an entry for each adapter that was fetched, the oldest first."""
        return self._folder.ledger()

    @property
    def weight(self) -> float:
        """Factor on the private part, as the user has set it, or else as training chose it."""
        own = self.settings.weight
        return self.model.serving.weight if own is None else own

    def history(self) -> tuple[Event, ...]:
        """All events, oldest first, those that do not count too."""
        return self.known.events

    def private_part(self) -> dict[str, torch.Tensor]:
        """The user's private tensors, from the events that count."""
        return self._ranking.private(self.known.counted)

    # What it does

    def recommend(
        self,
        k: int = 10,
        where: Mapping[str, str] | None = None,
        weight: float | None = None,
    ) -> list[Suggestion]:
        """The best items that the user has not met and has not turned down.

        Args:
            k: How many.
            where: Field to a text that the field must contain, whatever the case, such as
                ``{"genres": "comedy"}``.
            weight: Factor on the private part; None: as the user has set it.

        Raises:
            DataError: The items have no such field, or nothing is known and the model has nothing
                to rank by.
        """
        known, settings, ranking = self.known, self.settings, self._ranking
        now = self._clock()
        hidden = [item for item in {*known.hidden, *known.not_before} if known.is_hidden(item, now)]
        allowed = ranking.all_but(hidden) & ranking.matching(where or {})
        scores = ranking.both(known.counted, settings.weight if weight is None else weight)
        unwanted = self.model.items(known.less).tolist()
        lowered = self._similarity.lowered(scores.both, unwanted, settings.strength, allowed)
        best, _ = NewPlaces().top_items(
            np.where(allowed, lowered, np.nan), np.empty(0, np.int64), k, self.model.is_new
        )
        own, catalogue = scores.own(allowed), self.model.catalogue
        return [
            Suggestion(
                item_id=catalogue.item_ids[item],
                title=catalogue.fields[TITLE][item],
                fields={n: texts[item] for n, texts in catalogue.fields.items() if n != TITLE},
                place=place,
                place_shared=int(places(scores.shared, item, allowed)),
                own=float(own[item]),
            )
            for place, item in enumerate(best.tolist(), 1)
        ]

    def explain(self, item_id: str) -> Explanation:
        """Why an item stands where it stands; see `reasons`. Wishes for less are left out.

        Raises:
            DataError: There is no such item, or the user has met it.
        """
        return explain(self._ranking, self.known, item_id, self.settings.weight)

    def beliefs(self, k: int = 10) -> Beliefs:
        """What it believes of its user, beside the first ``k`` items of the list; see `beliefs`."""
        shown = [one.item_id for one in self.recommend(k)]
        found = believe(self._ranking, self.known, shown, self.settings.weight)
        return dataclasses.replace(found, account=Account.of(self.ledger()))

    # What the user says

    def feedback(self, item_id: str, kind: Kind | str, rating: float | None = None) -> bool:
        """Take in what the user says of an item.

        Args:
            item_id: External id.
            kind: One of `FEEDBACK`.
            rating: The user's rating, with ``like`` or ``seen``.

        Returns:
            Whether it was kept; an agent that is paused keeps nothing.

        Raises:
            DataError: There is no such item or kind.
        """
        if kind not in FEEDBACK:
            raise DataError(f"no feedback {str(kind)!r}; give one of {', '.join(FEEDBACK)}")
        self.model.items([item_id])
        if self.settings.paused:
            return False
        self._append(Action(kind=Kind(kind), at=self._clock(), item_id=item_id, rating=rating))
        return True

    def add_history(
        self,
        item_ids: Sequence[str],
        times: Sequence[float] | None = None,
        ratings: Sequence[float] | None = None,
    ) -> None:
        """Add events from elsewhere.

        Args:
            item_ids: External ids, oldest first.
            times: Seconds since 1970; None: now, one microsecond apart.
            ratings: One per item, or None.

        Raises:
            DataError: An item is not in the catalogue, or lengths differ; nothing is added.
        """
        self.model.items(item_ids)
        now = self._clock()
        when = times or [now - (len(item_ids) - n) * 1e-6 for n in range(len(item_ids))]
        rated: Sequence[float | None] = ratings or [None] * len(item_ids)
        if not len(item_ids) == len(when) == len(rated):
            raise DataError("add_history: give as many times and ratings as items")
        self._append(
            *(
                Action(kind=Kind.MET, at=at, item_id=item_id, rating=rating)
                for item_id, at, rating in zip(item_ids, when, rated, strict=True)
            )
        )

    def exclude(
        self, item_id: str | None = None, since: float | None = None, until: float | None = None
    ) -> None:
        """Let the events of an item, or of a period, count no more; `undo` takes it back.

        Raises:
            DataError: Neither an item of the history nor a period is given, or both are.
        """
        if item_id is not None and item_id not in {event.item_id for event in self.history()}:
            raise DataError(f"{item_id} is not in the history; there is nothing to leave out")
        if (item_id is None) == (since is None or until is None):
            raise DataError("exclude: give an item, or a period with since and until")
        at = self._clock()
        self._append(Action(kind=Kind.EXCLUDE, at=at, item_id=item_id, since=since, until=until))

    def include(self, item_id: str) -> None:
        """Let the events of an item count again that `exclude` left out."""
        self._folder.change(
            lambda actions: [
                one for one in actions if (one.kind, one.item_id) != (Kind.EXCLUDE, item_id)
            ]
        )

    def undo(self) -> Action | None:
        """Take back the last action; None: there is none."""
        taken: list[Action] = []

        def without_last(actions: list[Action]) -> list[Action]:
            taken.extend(actions[-1:])
            return actions[:-1]

        self._folder.change(without_last)
        return taken[0] if taken else None

    def mix(self, weight: float | None) -> None:
        """Set how strongly the private part counts, 0 to 1.5; None: as training chose it."""
        self._folder.set(weight=weight)

    def set_strength(self, strength: float) -> None:
        """Set how strongly "less like this" acts, 0 to 1."""
        self._folder.set(strength=strength)

    def pause(self, paused: bool = True) -> None:
        """Keep nothing of what the user does, until it is set to False."""
        self._folder.set(paused=paused)

    def contribute(self, on: bool) -> None:
        """Let a node of a federation learn from the history, or not."""
        self._folder.set(contributes=on)

    def sync(self, source: str, revision: str | None = None, **bases: Unpack[Bases]) -> Check:
        """Fetch a shared adapter, and use it if it serves the user's own past no worse.

        Nothing is sent but the request for its files. It is copied into the user's folder, so that
        `open` needs no network.

        Args:
            source: A folder, or ``user/name`` on the Hub.
            revision: As in `Recommender.from_pretrained`.
            bases: As there.

        Returns:
            How it serves the user's past; `Check.is_no_worse` says whether it is used now.

        Raises:
            HubError: The adapter cannot be had; the one before is used on.
            ArtefactError: It is no adapter of ours, or stands on another base.
            CorruptFileError: A file is damaged.
            ConfigError: Its private part is trained by steps.
        """
        artefact = hub.pull(source, revision)
        newer = Recommender.from_pretrained(
            artefact.folder, catalogue=self.model.catalogue, **bases
        )
        check_fits(newer)
        found = check(self.model, newer, self.known.counted)
        if found.is_no_worse:
            self._folder.keep_adapter(artefact.folder, artefact.manifest_sha256)
            self._serve_with(newer)
        received = sum(path.stat().st_size for path in artefact.folder.rglob("*") if path.is_file())
        self._folder.note(
            at=self._clock(),
            adapter=artefact.manifest_sha256,
            origin=artefact.origin,
            round=artefact.manifest.round,
            bytes_received=received,
            bytes_sent=0,
            used=found.is_no_worse,
            **vars(found),
        )
        return found

    def roll_back(self, **bases: Unpack[Bases]) -> bool:
        """Use the adapter before the newest `sync` again; False: there is none."""
        folder = self._folder.drop_adapter()
        if folder is None:
            return False
        catalogue = self.model.catalogue
        self._serve_with(Recommender.from_pretrained(folder, catalogue=catalogue, **bases))
        return True

    def forget(
        self, item_id: str | None = None, since: float | None = None, until: float | None = None
    ) -> int:
        """Delete every action about an item or of a period; without arguments everything.

        Returns:
            The number of actions that were deleted.

        Raises:
            DataError: Half a period is given, or an item and a period.
        """
        if (since is None) != (until is None) or (item_id is not None and since is not None):
            raise DataError("forget: give an item, a period with since and until, or nothing")
        before = self._folder.actions()
        self._serve_with(self.model)  # which drops what was read off the history
        if item_id is None and since is None:
            self._folder.destroy()
            return len(before)

        def is_kept(action: Action) -> bool:
            if since is not None and until is not None:
                return not since <= action.at < until
            return action.item_id != item_id

        self._folder.change(lambda actions: [one for one in actions if is_kept(one)])
        return len(before) - len(self._folder.actions())

    def export(self, path: str | Path) -> None:
        """Write all that the agent knows to one plain file, for its owner alone."""
        files.write_json(Path(path), self._folder.export())

    def import_(self, path: str | Path) -> None:
        """Replace all that the agent knows by what `export` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptFileError: It is no export; the agent knows what it knew.
        """
        self._folder.import_(files.read_json(Path(path)), Path(path))

    @functools.cached_property
    def _similarity(self) -> Similarity:
        return Similarity(*self.model.serving.item_vectors())

    def _serve_with(self, model: Recommender) -> None:
        self.model, self._ranking = model, Ranking(model)
        self.__dict__.pop("_similarity", None)

    def _append(self, *new: Action) -> None:
        self._folder.change(lambda actions: [*actions, *new])
