"""What a batch knows of each user's past."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pfm_llm.model.batches import ChunkBatch, collate
from pfm_llm.text.encoding import NO_LABEL, NO_TARGET, Window

NUM_ITEMS = 7


def _cut(history: list[int], size: int, known: int = 0) -> list[Window]:
    """Windows that tile a history; a token an item. The first ``known`` targets are none."""
    windows = []
    targets = [*[NO_TARGET] * known, *history[1 + known :], NO_TARGET][-len(history) :]
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


def _batch(histories: list[list[int]], size: int) -> ChunkBatch:
    windows = [_cut(history, size) for history in histories]
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
    history=st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12),
    size=st.integers(1, 5),
    known=st.integers(0, 5),
    data=st.data(),
)
def test_each_target_is_at_its_place_in_all_that_was_met(
    history: list[int], size: int, known: int, data: st.DataObject
) -> None:
    """Whichever windows a step reads, and where the first targets are none."""
    windows = [w for w in _cut(history, size, known) if w.num_targets]
    assume(windows)
    chosen = data.draw(st.sets(st.sampled_from(range(len(windows))), min_size=1))
    picked = [windows[i] for i in sorted(chosen)]
    batch = collate([picked], [[torch.zeros(len(w.tokens), 2) for w in picked]])
    [met] = batch.met_per_client
    places = batch.known.tolist()
    assert met.tolist() == history[: len(met)]
    assert met[batch.known].tolist() == batch.targets.tolist()
    expected = [
        t for t in range(known + 1, len(history)) if (t - 1) // size in _starts(picked, size)
    ]
    assert places == expected


def _starts(windows: list[Window], size: int) -> set[int]:
    return {len(window.before) // size for window in windows}
