"""Why an item stands where it stands: which past items moved it, and how much is one's own.

A reason is an exact leave-one-out: the user is served once more as if one event had never been, in
the prompt and in the private part. With p the share that an item has of the softmax over all items
that the user has not met, its effect is

    log p(item | history) - log p(item | history without the event).

What is the user's own is the same difference between the shared part with the private part, and the
shared part alone. A sentence says what these numbers say, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pfm_llm.agent.actions import Known
from pfm_llm.agent.ranking import Ranking, log_shares, places
from pfm_llm.base.errors import DataError
from pfm_llm.data.interactions import TITLE

FEW_EVENTS = 5
NAMED = 3
"""How many past items a sentence names at most."""


@dataclass(frozen=True)
class Reason:
    """A past item that moved a recommendation.

    Attributes:
        item_id: External id.
        title: Its text.
        effect: How much it raises the log-probability of the recommended item; below 0: it lowers.
        place_without: The place of the recommended item if the user had not met it, from 1.
    """

    item_id: str
    title: str
    effect: float
    place_without: int


@dataclass(frozen=True)
class Explanation:
    """Why an item stands where it stands.

    Attributes:
        item_id: External id.
        title: Its text.
        place: Its place among the items that the user has not met, from 1.
        place_shared: Its place by the shared part alone, after the same history.
        own: How much the private part raises its log-probability.
        reasons: All past items that count, the one that raises it most first.
        sentence: The reasons in plain words.
        warning: What the user should know of these reasons; empty: nothing.
    """

    item_id: str
    title: str
    place: int
    place_shared: int
    own: float
    reasons: tuple[Reason, ...]
    sentence: str
    warning: str


def explain(ranking: Ranking, known: Known, item_id: str, weight: float | None) -> Explanation:
    """Why an item stands where it stands among the items that the user has not met.

    Args:
        ranking: Ranks for the user.
        known: What is known of the user; wishes for less are left out.
        item_id: External id.
        weight: Factor on the private part; None: as training chose it.

    Raises:
        DataError: There is no such item, or the user has met it.
    """
    (item,) = ranking.model.items([item_id]).tolist()
    met = [event.item_id for event in known.events]
    if item_id in met:
        raise DataError(f"{item_id} is in the history; explain an item that is not")
    events, candidates = known.counted, ranking.all_but(met)
    scores = ranking.both(events, weight)
    now = float(log_shares(scores.both, candidates)[item])
    titles = ranking.model.catalogue.fields[TITLE]
    found = [
        Reason(
            event.item_id,
            titles[int(ranking.model.items([event.item_id])[0])],
            now - float(log_shares(without, candidates)[item]),
            places(without, item, candidates),
        )
        for event, without in ranking.without_each(events, weight)
    ]
    found.sort(key=lambda reason: -reason.effect)
    place, by_all = (places(one, item, candidates) for one in (scores.both, scores.shared))
    return Explanation(
        item_id=item_id,
        title=titles[item],
        place=place,
        place_shared=by_all,
        own=float(scores.own(candidates)[item]),
        reasons=tuple(found),
        sentence=sentence(titles[item], place, by_all, found),
        warning=warning(len(events)),
    )


def sentence(title: str, place: int, shared: int, reasons: Sequence[Reason]) -> str:
    """The reasons in plain words."""
    moved = [reason for reason in reasons if reason.effect > 0][:NAMED]
    if moved:
        names = _listed([f"“{reason.title}”" for reason in moved])
        first = moved[0]
        text = f"“{title}” is number {place} because of {names}."
        if first.place_without != place:
            text += f" Without “{first.title}” it would be number {first.place_without}."
    else:
        text = f"“{title}” is number {place}, and no single item of your history brought it there."
    if shared != place:
        text += f" By what everyone has taught the model it would be number {shared}; "
        text += "your own part moves it " + ("up." if shared > place else "down.")
    return text


def warning(num_events: int) -> str:
    """What the user should know of the reasons; empty: nothing."""
    if not num_events:
        return "Nothing is known of you yet: the list is what most people like."
    if num_events < FEW_EVENTS:
        events = "one event counts" if num_events == 1 else f"{num_events} events count"
        return f"Only {events} so far, so a single one weighs much."
    return ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
