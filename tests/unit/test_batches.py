"""What a batch knows of each user's past."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.batches import ChunkBatch, collate
from pfm_llm.encoding import NO_LABEL, NO_TARGET, Window

NUM_ITEMS = 7


def _cut(history: list[int], size: int) -> list[Window]:
    """Windows that tile a history; a token an item."""
    windows = []
    targets = [*history[1:], NO_TARGET]
    for start in range(0, len(history), size):
        stop = min(len(history), start + size)
        windows.append(
            Window(
                tokens=np.zeros(stop - start, np.int32),
                item_ends=np.arange(stop - start, dtype=np.int32),
                items=np.array(history[start:stop], np.int32),
                targets=np.array(targets[start:stop], np.int32),
                liked=np.full(stop - start, NO_LABEL, np.int8),
                before=np.array(history[:start], np.int32),
            )
        )
    return windows


def _batch(histories: list[list[int]], size: int, newest: int | None = None) -> ChunkBatch:
    windows = [_cut(history, size)[-(newest or 0) :] for history in histories]
    states = [[torch.zeros(len(w.tokens), 2) for w in own] for own in windows]
    return collate(windows, states)


@given(
    histories=st.lists(
        st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12), min_size=1, max_size=4
    ),
    size=st.integers(1, 5),
)
def test_seen_is_what_the_user_had_met_but_for_the_target(
    histories: list[list[int]], size: int
) -> None:
    expected = [
        [item in history[: t + 1] and item != history[t + 1] for item in range(NUM_ITEMS)]
        for history in histories
        for t in range(len(history) - 1)
    ]
    assert _batch(histories, size).seen(NUM_ITEMS).tolist() == expected


@given(
    histories=st.lists(
        st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12), min_size=1, max_size=4
    ),
    size=st.integers(1, 5),
    newest=st.none() | st.integers(1, 3),
)
def test_each_target_is_at_its_place_in_all_that_was_met(
    histories: list[list[int]], size: int, newest: int | None
) -> None:
    batch = _batch(histories, size, newest)
    assert [met.tolist() for met in batch.met_per_client] == histories
    outputs = zip(
        batch.known.split(batch.outputs_per_client),
        batch.targets.split(batch.outputs_per_client),
        strict=True,
    )
    for history, (known, targets) in zip(histories, outputs, strict=True):
        assert known.tolist() == list(range(len(history) - len(known), len(history)))
        assert targets.tolist() == [history[place] for place in known]
