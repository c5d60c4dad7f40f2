"""What a batch knows of each user's past."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pfm_llm.data.history import History
from pfm_llm.model.batches import ChunkBatch, collate
from pfm_llm.text.encoding import NO_TARGET, Window

NUM_ITEMS = 7


def _cut(items: list[int], size: int, known: int = 0) -> list[Window]:
    """Windows that tile a history; a token an item. The first ``known`` targets are none."""
    history = History(np.array(items, np.int32))
    return [
        Window(
            tokens=np.zeros(len(items[start : start + size]), np.int32),
            item_ends=np.arange(len(items[start : start + size]), dtype=np.int32),
            history=history,
            start=start,
            first_target=known + 1,
        )
        for start in range(0, len(items), size)
    ]


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
def test_seen_are_the_items_before_a_target_without_the_target(
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
def test_each_target_is_at_its_place_in_the_history(
    history: list[int], size: int, known: int, data: st.DataObject
) -> None:
    """Whichever windows a step reads, and where the first targets are none."""
    windows = [w for w in _cut(history, size, known) if w.num_targets]
    assume(windows)
    chosen = data.draw(st.sets(st.sampled_from(range(len(windows))), min_size=1))
    picked = [windows[i] for i in sorted(chosen)]
    batch = collate([picked], [[torch.zeros(len(w.tokens), 2) for w in picked]])
    [met] = batch.histories_per_client
    places = batch.known.tolist()
    assert met.tolist() == history[: len(met)]
    assert met[batch.known].tolist() == batch.targets.tolist()
    expected = [
        t for t in range(known + 1, len(history)) if (t - 1) // size in _starts(picked, size)
    ]
    assert places == expected


def _starts(windows: list[Window], size: int) -> set[int]:
    return {window.start // size for window in windows}


@given(
    history=st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12),
    size=st.integers(1, 5),
    known=st.integers(0, 5),
    horizon=st.integers(1, 15),
)
def test_later_items_are_those_of_the_history_up_to_the_horizon(
    history: list[int], size: int, known: int, horizon: int
) -> None:
    windows = [w for w in _cut(history, size, known) if w.num_targets]
    assume(windows)
    states = [torch.zeros(len(w.tokens), 2) for w in windows]
    batch = collate([windows], [states], horizon=horizon)
    padded = [*history, *[NO_TARGET] * horizon]
    for place, target, later in zip(
        batch.known.tolist(), batch.targets.tolist(), batch.later.tolist(), strict=True
    ):
        assert target == history[place]
        assert later == padded[place + 1 : place + horizon]
    assert batch.later.shape == (len(batch.targets), horizon - 1)


@given(
    history=st.lists(st.integers(0, NUM_ITEMS - 1), min_size=2, max_size=12),
    size=st.integers(1, 5),
)
def test_a_row_has_read_its_items_up_to_the_output(history: list[int], size: int) -> None:
    batch = _batch([history], size)
    expected = [place % size + 1 for place in range(len(history) - 1)]
    assert batch.num_read.tolist() == expected


def test_sums_are_over_all_items_of_the_row() -> None:
    batch = _batch([[1, 2, 3], [4, 4]], 2)
    values = torch.arange(NUM_ITEMS, dtype=torch.float32)[:, None]
    assert batch.sums(values)[:, 0].tolist() == [3, 3, 8]
