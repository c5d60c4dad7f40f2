"""Small interactions to split, and what became of them."""

from collections.abc import Sequence

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import SplitKind
from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.splits import HeldOut, Split, split_interactions

LAST_OUT = DataConfig(split=SplitKind.LEAVE_LAST_OUT)
FRACTION = DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.2)
FIRST_ITEM = 100
"""Items of coded data start here, above every offset (at most 8 users of 12 events)."""


def make(
    histories: Sequence[Sequence[int]],
    times: Sequence[Sequence[int]] | None = None,
    ratings: bool = False,
) -> Interactions:
    """Interactions with these items per user; an event's rating is its index plus one half."""
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    num_items = int(items.max(initial=0)) + 1
    item_ids = tuple(f"i{item}" for item in range(num_items))
    flat = None if times is None else np.array([t for u in times for t in u], dtype=np.int64)
    return Interactions(
        catalogue=Catalogue(item_ids, {"title": item_ids}),
        user_ids=tuple(f"u{user}" for user in range(len(histories))),
        offsets=np.cumsum([0, *map(len, histories)], dtype=np.int64),
        items=items,
        timestamps=flat,
        ratings=np.arange(len(items), dtype=np.float32) + 0.5 if ratings else None,
    )


def queries(held_out: HeldOut) -> dict[int, tuple[list[int], list[int]]]:
    """User to (history, targets)."""
    triples = zip(held_out.users, held_out.histories, held_out.targets, strict=True)
    return {int(user): (history.tolist(), found.tolist()) for user, history, found in triples}


def train_histories(split: Split) -> list[list[int]]:
    train = split.train.interactions
    return [train.history(user).tolist() for user in range(train.num_users)]


@st.composite
def coded_interactions(draw: st.DrawFn) -> Interactions:
    """Random interactions where each item and rating stands for one event; times have ties."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    total = sum(lengths)
    times = draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
    items = iter(range(FIRST_ITEM, FIRST_ITEM + total))
    histories = [[next(items) for _ in range(length)] for length in lengths]
    source = iter(times)
    ordered = [sorted(1_000_000 + next(source) for _ in range(length)) for length in lengths]
    return make(histories, ordered, ratings=True)


KINDS = st.sampled_from(list(SplitKind))
SHARES = st.floats(0.05, 0.95)


def try_split(
    interactions: Interactions, kind: SplitKind, share: float, keep_ties: bool = False
) -> Split:
    """Split, or skip the example where the rule rightly finds nothing to ask."""
    config = DataConfig(split=kind, held_out=share, keep_ties=keep_ties)
    try:
        return split_interactions(interactions, config)
    except DataError:
        reject()
