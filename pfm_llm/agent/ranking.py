"""The catalogue, ranked for one user: with their private part, without it, and without an event."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pfm_llm.agent.actions import Event
from pfm_llm.base.errors import DataError
from pfm_llm.base.turns import Turns
from pfm_llm.data.history import History
from pfm_llm.model.private.last_layer import LastTokens
from pfm_llm.recommender import Recommender
from pfm_llm.recommender.serving import Served

_IN_A_PASS = 8
"""Histories of a pass; another thread has its turn after each."""


@dataclass(frozen=True)
class Scores:
    """Scores of the catalogue after one history.

    Attributes:
        both: float32 [I], with the private part.
        shared: float32 [I], by the shared part alone.
    """

    both: np.ndarray
    shared: np.ndarray

    def own(self, candidates: np.ndarray) -> np.ndarray:
        """How much the private part raises the log-probability of each candidate, float64 [I]."""
        both, shared = (log_shares(one, candidates) for one in (self.both, self.shared))
        return np.subtract(both, shared, out=np.zeros_like(both), where=candidates)


@dataclass(frozen=True)
class _Read:
    """What is the same for some events whatever the weight is."""

    events: tuple[Event, ...]
    private: dict[str, torch.Tensor]
    shared: np.ndarray
    kept: LastTokens


_Without = tuple[tuple[tuple[Event, ...], float | None], list[tuple[Event, np.ndarray]]]
"""Events and a weight, and the scores without each of the events."""


class Ranking:
    """Ranks the catalogue for one user at a time; several threads may use it.

    It keeps in memory what it found for the events of the last call, and nothing older: a new
    weight then costs one pass.

    Args:
        model: The recommender.
    """

    def __init__(self, model: Recommender) -> None:
        self.model = model
        self._turns = Turns()
        self._last: _Read | None = None
        self._last_without: _Without | None = None

    def private(self, events: Sequence[Event]) -> dict[str, torch.Tensor]:
        """The private tensors of some events."""
        with self._turns:
            return self.model.serving.fit([self._history(events)])[0]

    def both(self, events: Sequence[Event], weight: float | None) -> Scores:
        """The scores after some events; see `StackedServing.scores`."""
        with self._turns:
            read = self._read(tuple(events))
            served = Served(self._history(events), read.private, read.kept)
            (both,) = self.model.serving.scores([served], weight)
        return Scores(both, read.shared)

    def _read(self, events: tuple[Event, ...]) -> _Read:
        if self._last is None or self._last.events != events:
            history, serving = self._history(events), self.model.serving
            (private,) = serving.fit([history])
            kept = LastTokens()
            (shared,) = serving.scores([Served(history, None, kept)])
            self._last = _Read(events, private, shared, kept)
        return self._last

    def without_each(
        self, events: Sequence[Event], weight: float | None
    ) -> Sequence[tuple[Event, np.ndarray]]:
        """Each event with the scores [I] after all the others, as if it had never been.

        They are kept for the last call: they are the reasons of every item.
        """
        asked = tuple(events), weight
        if self._last_without is None or self._last_without[0] != asked:
            self._last_without = asked, list(self._without_each(*asked))
        return self._last_without[1]

    def _without_each(
        self, events: tuple[Event, ...], weight: float | None
    ) -> Iterator[tuple[Event, np.ndarray]]:
        for start in range(0, len(events), _IN_A_PASS):
            chunk = range(start, min(start + _IN_A_PASS, len(events)))
            left = [self._history([*events[:out], *events[out + 1 :]]) for out in chunk]
            scores = self._after(left, weight)
            yield from ((events[out], one) for out, one in zip(chunk, scores, strict=True))

    def _after(self, histories: Sequence[History], weight: float | None = None) -> np.ndarray:
        """Scores [U, I] after each history, with the private part of it; one turn."""
        serving = self.model.serving
        with self._turns:
            fitted = serving.fit(histories)
            served = [Served(*one) for one in zip(histories, fitted, strict=True)]
            return serving.scores(served, weight)

    def log_shares_of_next(self, events: Sequence[Event], first: int) -> list[float]:
        """The log-probability of each event from number ``first`` on, after all before it.

        It is over the items that the user had not met by then, with the private part of that time.
        """
        found = []
        items = self.model.items([event.item_id for event in events]).tolist()
        for start in range(first, len(events), _IN_A_PASS):
            chunk = range(start, min(start + _IN_A_PASS, len(events)))
            past = [self._history(events[:number]) for number in chunk]
            for number, scores in zip(chunk, self._after(past), strict=True):
                unmet = np.ones(len(scores), bool)
                unmet[items[:number]] = False
                found.append(float(log_shares(scores, unmet)[items[number]]))
        return found

    def all_but(self, item_ids: Sequence[str]) -> np.ndarray:
        """The catalogue without some items, bool [I]."""
        rest = np.ones(len(self.model.catalogue), bool)
        rest[self.model.items(item_ids)] = False
        return rest

    def matching(self, where: Mapping[str, str]) -> np.ndarray:
        """The items whose fields contain given texts, whatever the case, bool [I].

        Raises:
            DataError: The items have no such field.
        """
        fields, matching = self.model.catalogue.fields, np.ones(len(self.model.catalogue), bool)
        for name, wanted in where.items():
            if name not in fields:
                raise DataError(f"items have no field {name!r}; there are {', '.join(fields)}")
            sought = wanted.casefold()
            matching &= np.array([sought in text.casefold() for text in fields[name]])
        return matching

    def _history(self, events: Sequence[Event]) -> History:
        items = self.model.items([event.item_id for event in events])
        ratings = [event.rating for event in events if event.rating is not None]
        rated = np.array(ratings, np.float32) if len(ratings) == len(events) else None
        return History(items, rated)


def log_shares(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Log-probabilities of a softmax over the candidates, float64 [..., I]; others: -inf."""
    left = np.where(candidates, scores.astype(np.float64), -np.inf)
    top = left.max(-1, keepdims=True)
    found: np.ndarray = left - top - np.log(np.exp(left - top).sum(-1, keepdims=True))
    return found


def places(scores: np.ndarray, item: int, candidates: np.ndarray) -> int:
    """The place of an item among the candidates, from 1; ties count against it."""
    others = candidates.copy()
    others[item] = False
    return 1 + int((others & (scores >= scores[item])).sum())
