"""What an agent believes of its user, in numbers that follow from its memory.

It says three things. Which values of the items' fields (genres, decades) the counted history has,
beside those of the list. Which items the private part pushes up and down most, as the difference of
their log-probabilities with it and without it. And what there is to know them from: events, bytes,
and what has left the folder.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pfm_llm.agent.actions import Known
from pfm_llm.agent.ranking import Ranking
from pfm_llm.data.interactions import TITLE, Catalogue

PUSHED = 5
"""How many items are named in each direction."""
MOST_VALUES = 8
"""How many values of a field are named."""
_YEAR = re.compile(r"(\d{3})\d")


@dataclass(frozen=True)
class Value:
    """A value of a field, such as a genre.

    Attributes:
        text: The value; a year stands for its decade, as ``1990s``.
        in_history: The share of counted events that have it, 0 to 1.
        in_list: The share of the list that has it, 0 to 1.
    """

    text: str
    in_history: float
    in_list: float


@dataclass(frozen=True)
class Pushed:
    """An item that the private part moves.

    Attributes:
        item_id: External id.
        title: Its text.
        own: How much the private part raises its log-probability; below 0: it lowers it.
    """

    item_id: str
    title: str
    own: float


@dataclass(frozen=True)
class Account:
    """What has left the folder.

    Attributes:
        last_sync: When an adapter was fetched last, in seconds since 1970; None: never.
        bytes_sent: How much was ever sent.
        epsilon: What was spent of a privacy budget; None: there is no ledger.
    """

    last_sync: float | None = None
    bytes_sent: int = 0
    epsilon: float | None = None

    @classmethod
    def of(cls, ledger: Sequence[Mapping[str, Any]]) -> "Account":
        """The account of a ledger; see `AgentFolder.ledger`."""
        sent = sum(entry["bytes_sent"] for entry in ledger)
        return cls(ledger[-1]["at"] if ledger else None, sent)


@dataclass(frozen=True)
class Beliefs:
    """What an agent believes of its user.

    Attributes:
        num_events: Events of the history.
        num_counted: Those that count.
        values: Field to its most frequent values, the most frequent in the history first.
        up: The items that the private part raises most, the most first.
        down: The items that it lowers most, the most first.
        num_numbers: Numbers of the private part.
        num_bytes: Its size in bytes.
        account: What has left the folder.
    """

    num_events: int
    num_counted: int
    values: dict[str, tuple[Value, ...]]
    up: tuple[Pushed, ...]
    down: tuple[Pushed, ...]
    num_numbers: int
    num_bytes: int
    account: Account = field(default_factory=Account)


def believe(ranking: Ranking, known: Known, shown: Sequence[str], weight: float | None) -> Beliefs:
    """What follows from the memory of an agent.

    Args:
        ranking: Ranks for the user.
        known: What is known of the user.
        shown: The items of the list.
        weight: Factor on the private part; None: as training chose it.

    Raises:
        DataError: The history is empty and the model has nothing to rank by.
    """
    items, met = ranking.model.items, [event.item_id for event in known.counted]
    private = ranking.private(known.counted).values()
    up, down = _pushed(ranking, known, weight)
    return Beliefs(
        num_events=len(known.events),
        num_counted=len(met),
        values=shares_of_values(
            ranking.model.catalogue, items(met).tolist(), items(shown).tolist()
        ),
        up=up,
        down=down,
        num_numbers=sum(one.numel() for one in private),
        num_bytes=sum(one.numel() * one.element_size() for one in private),
    )


def _pushed(
    ranking: Ranking, known: Known, weight: float | None
) -> tuple[tuple[Pushed, ...], tuple[Pushed, ...]]:
    """Of the items that the user has not met: those that rise and those that fall."""
    catalogue = ranking.model.catalogue
    unmet = ranking.all_but([event.item_id for event in known.events])
    own = ranking.both(known.counted, weight).own(unmet)
    order = np.argsort(-own, kind="stable").tolist()

    def named(items: Sequence[int]) -> tuple[Pushed, ...]:
        titles = catalogue.fields[TITLE]
        return tuple(Pushed(catalogue.item_ids[i], titles[i], float(own[i])) for i in items)

    up = [item for item in order if own[item] > 0][:PUSHED]
    down = [item for item in reversed(order) if own[item] < 0][:PUSHED]
    return named(up), named(down)


def shares_of_values(
    catalogue: Catalogue, met: Sequence[int], shown: Sequence[int]
) -> dict[str, tuple[Value, ...]]:
    """Field to its most frequent values, in two lists of internal ids; titles are left out."""
    found = {}
    for name, texts in catalogue.fields.items():
        if name == TITLE:
            continue
        history, listed = (
            Counter(value for item in items for value in values_of(texts[item]))
            for items in (met, shown)
        )
        order = sorted(history | listed, key=lambda text: (-history[text], -listed[text], text))
        found[name] = tuple(
            Value(text, history[text] / max(1, len(met)), listed[text] / max(1, len(shown)))
            for text in order[:MOST_VALUES]
        )
    return found


def values_of(text: str) -> set[str]:
    """The values of a field's text: its parts between commas, and the decade of a year."""
    parts = {part.strip() for part in text.split(",")} - {""}
    return {_YEAR.sub(r"\g<1>0s", part) if _YEAR.fullmatch(part) else part for part in parts}
