"""What a user has done and told their agent, and what follows from it.

An agent keeps a list of actions, and nothing that was made from them. All that it knows of its user
follows from this list each time. An action that is taken back, or forgotten, therefore leaves no
trace: the rest of the list gives what it would have given if the action had never been.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, model_validator


class Kind(StrEnum):
    """What an action is."""

    MET = "met"
    """The user met the item, as a history from elsewhere tells."""
    SEEN = "seen"
    """The user knows the item already."""
    LIKE = "like"
    """The user likes the item; it counts as met."""
    DISLIKE = "dislike"
    """The user does not want the item. It is not shown again, and similar items stay."""
    LESS_LIKE_THIS = "less_like_this"
    """The item is not shown again, and similar items go down; see `less`."""
    NOT_NOW = "not_now"
    """The item is not shown for a month."""
    EXCLUDE = "exclude"
    """Events of an item, or of a period, do not count. They are not shown again all the same."""


EVENTS = frozenset({Kind.MET, Kind.SEEN, Kind.LIKE})
"""The kinds that are events of the history."""
NOT_NOW_SECONDS = 30 * 24 * 3600.0


class Action(BaseModel):
    """One action.

    Attributes:
        kind: What it is.
        at: When, in seconds since 1970.
        item_id: Which item; None with a period.
        rating: The user's rating of it, or None.
        since: Begin of an excluded period, in seconds since 1970.
        until: End of it; it does not belong to the period.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind
    at: float
    item_id: str | None = None
    rating: float | None = None
    since: float | None = None
    until: float | None = None

    @model_validator(mode="after")
    def _names_something(self) -> "Action":
        is_period = self.since is not None and self.until is not None
        if (self.item_id is None) != is_period:
            raise ValueError("an action names an item, or a period from since to until")
        if is_period and self.kind is not Kind.EXCLUDE:
            raise ValueError("only exclude takes a period")
        return self


@dataclass(frozen=True)
class Event:
    """An item that the user met.

    Attributes:
        item_id: External id.
        at: When, in seconds since 1970.
        rating: The user's rating, or None.
        counts: Whether the agent learns from it.
    """

    item_id: str
    at: float
    rating: float | None
    counts: bool


@dataclass(frozen=True)
class Known:
    """What an agent knows of its user.

    Attributes:
        events: All events, oldest first; of an item that was met again, the first one that counts.
        hidden: Items that are not shown.
        not_before: Item to the time until which it is not shown.
        less: Items of which the user wants less, the oldest wish first.
    """

    events: tuple[Event, ...]
    hidden: frozenset[str]
    not_before: Mapping[str, float]
    less: tuple[str, ...]

    @classmethod
    def of(cls, actions: Iterable[Action]) -> "Known":
        """What follows from some actions, whatever their order in the list where times differ."""
        actions = sorted(actions, key=lambda action: action.at)
        excluded = [action for action in actions if action.kind is Kind.EXCLUDE]
        events: dict[str, Event] = {}
        for action in actions:
            if action.kind not in EVENTS or action.item_id is None:
                continue
            counts = not any(_is_excluded(action, one) for one in excluded)
            known = events.get(action.item_id)
            if known is None or (counts and not known.counts):
                events.pop(action.item_id, None)
                events[action.item_id] = Event(action.item_id, action.at, action.rating, counts)
        of = {kind: [a for a in actions if a.kind is kind] for kind in Kind}
        hidden = {a.item_id for a in of[Kind.DISLIKE] + of[Kind.LESS_LIKE_THIS] if a.item_id}
        later = {a.item_id: a.at + NOT_NOW_SECONDS for a in of[Kind.NOT_NOW] if a.item_id}
        less = dict.fromkeys(a.item_id for a in of[Kind.LESS_LIKE_THIS] if a.item_id)
        return cls(tuple(events.values()), frozenset(hidden | events.keys()), later, tuple(less))

    @property
    def counted(self) -> tuple[Event, ...]:
        """The events from which the agent learns, oldest first."""
        return tuple(event for event in self.events if event.counts)

    def is_hidden(self, item_id: str, now: float) -> bool:
        """Whether an item is not to be shown at a time."""
        return item_id in self.hidden or self.not_before.get(item_id, now) > now


def _is_excluded(event: Action, by: Action) -> bool:
    if by.item_id is not None:
        return by.item_id == event.item_id
    assert by.since is not None
    assert by.until is not None
    return by.since <= event.at < by.until
