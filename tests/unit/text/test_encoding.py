"""Histories as windows: every transition once, exact item ends, and the edges."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.config.model import WindowConfig
from pfm_llm.data.history import History
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.encoding import NO_TARGET, HistoryEncoder, Window, windows_hash
from pfm_llm.text.prompts import Prompt

NEW_LINE = 10
PROMPT = Prompt("p", 1, "H:\n", "{title}\n", "{title}\n", ("title",))
RATED = Prompt("p", 1, "H:\n", "{title}[={rating}]\n", "{title}\n", ("title",))
TITLES = ("a", "bb", "ccc", "a very long title", "é")
CATALOGUE = Catalogue(tuple(f"i{i}" for i in range(5)), {"title": TITLES})


class Characters:
    """A tokenizer with a token per character."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"a character": 0}


def _encoder(prompt: Prompt = PROMPT, max_tokens: int = 1000, **settings: Any) -> HistoryEncoder:
    config = WindowConfig(**{"items": 3, "max_item_tokens": 8, "reading": "tokens", **settings})
    return HistoryEncoder(prompt, CATALOGUE, Characters(), config, max_tokens)


def _text(window: Window) -> str:
    return "".join(map(chr, window.tokens.tolist()))


def _history(*items: int, ratings: Sequence[float] | None = None) -> History:
    rated = None if ratings is None else np.array(ratings, np.float32)
    return History(np.array(items, dtype=np.int32), rated)


def test_a_window_is_the_header_and_its_items_and_knows_where_each_ends() -> None:
    r"""Header "H:\n" is tokens 0-2; "a\n" ends at 4, "ccc\n" at 8."""
    window = _encoder().window(_history(0, 2))
    assert _text(window) == "H:\na\nccc\n"
    assert window.item_ends.tolist() == [4, 8]
    assert [window.tokens[end] for end in window.item_ends] == [NEW_LINE, NEW_LINE]
    assert window.items.tolist() == [0, 2]
    assert window.targets.tolist() == [2, NO_TARGET]
    assert (len(window), window.num_targets) == (2, 1)
    assert {a.dtype for a in (window.tokens, window.item_ends, window.items)} == {np.dtype("int32")}


def test_a_long_text_is_cut_but_ends_with_its_end_token() -> None:
    encoder = _encoder()
    window = encoder.window(_history(3, 0))
    assert _text(window) == "H:\na very \na\n"  # 7 characters and the end make 8 tokens
    assert window.item_ends.tolist() == [10, 12]
    assert encoder.catalogue_pieces(8)[3] == [ord(c) for c in "a very \n"]
    assert encoder.catalogue_pieces(6)[3] == [ord(c) for c in "a ver\n"]
    assert encoder.catalogue_pieces(6)[1] == [ord(c) for c in "bb\n"]
    assert encoder.catalogue_pieces()[3] == [ord(c) for c in "a very \n"]
    assert encoder.prompt_pieces()[3] == [ord(c) for c in "a very \n"]


def test_ratings_are_read_where_the_prompt_shows_them() -> None:
    encoder = _encoder(RATED)
    rated = _history(0, 1, ratings=[5.0, 3.5])
    assert _text(encoder.window(rated)) == "H:\na=5\nbb=3.5\n"
    assert _text(encoder.window(_history(0, 1))) == "H:\na\nbb\n"
    known = HistoryEncoder(RATED, CATALOGUE, Characters(), encoder.config, 1000, (5.0, 3.5))
    assert _text(known.window(rated)) == "H:\na=5\nbb=3.5\n"
    longer = _history(0, 1, 2, 4, ratings=[1, 2, 3, 4])
    windows = encoder.training_windows(longer)
    assert [_text(window) for window in windows] == ["H:\na=1\n", "H:\nbb=2\nccc=3\né=4\n"]
    assert _text(encoder.query_window(longer)) == "H:\nbb=2\nccc=3\né=4\n"
    assert _text(_encoder().window(rated[:1])) == "H:\na\n"


@given(
    items=st.lists(st.integers(0, 4), min_size=2, max_size=20),
    size=st.integers(1, 6),
)
def test_every_transition_is_a_target_exactly_once(items: list[int], size: int) -> None:
    """The windows tile the history up to its last item; position j predicts item j + 1."""
    windows = _encoder(items=size).training_windows(_history(*items))
    pairs = [
        (item, target)
        for window in windows
        for item, target in zip(window.items.tolist(), window.targets.tolist(), strict=True)
    ]
    found = [pair for pair in pairs if pair[1] != NO_TARGET]
    assert found == list(itertools.pairwise(items))
    assert all(1 <= len(window) <= size for window in windows)
    assert all(len(window) == size for window in windows[1:])
    assert all(window.num_targets for window in windows)
    if size > 1:  # else the last item makes a window without target, which is left out
        assert [item for item, _ in pairs] == items
        starts = np.cumsum([0, *map(len, windows[:-1])]).tolist()
        assert [window.start for window in windows] == starts
    for window in windows:
        assert window.item_ends[-1] == len(window.tokens) - 1
        assert all(window.tokens[end] == NEW_LINE for end in window.item_ends)


@given(items=st.lists(st.integers(0, 4), min_size=2, max_size=20), data=st.data())
def test_a_history_that_grew_adds_the_new_transitions(
    items: list[int], data: st.DataObject
) -> None:
    """Old windows and new ones hold every transition once; the newest shows what a query shows."""
    size = data.draw(st.integers(2, 6))
    known = data.draw(st.integers(1, len(items) - 1))
    encoder, history = _encoder(items=size), _history(*items)
    old = encoder.training_windows(history[:known])
    new = encoder.training_windows(history, num_known=known)
    found = [
        (item, target)
        for window in (*old, *new)
        for item, target in zip(window.items.tolist(), window.targets.tolist(), strict=True)
        if target != NO_TARGET
    ]
    assert found == list(itertools.pairwise(items))
    assert all(window.num_targets for window in new)
    for window in new:
        assert window.items.tolist() == items[window.start :][: len(window)]
        # The user's history, up to the last target of the window.
        stop = window.start + len(window) + bool(window.targets[-1] != NO_TARGET)
        assert window.met.tolist() == items[:stop]
    assert new[-1].tokens.tolist() == encoder.query_window(history).tokens.tolist()


@given(
    length=st.integers(2, 20),
    size=st.integers(1, 5),
    max_windows=st.integers(1, 4),
)
def test_max_windows_keeps_the_newest(length: int, size: int, max_windows: int) -> None:
    history = _history(*(np.arange(length) % 5).tolist())
    every = _encoder(items=size).training_windows(history)
    newest = _encoder(items=size, max_windows=max_windows).training_windows(history)
    assert len(newest) == min(max_windows, len(every))
    kept = every[-max_windows:]
    assert [w.targets.tolist() for w in newest] == [w.targets.tolist() for w in kept]


def test_short_histories_train_nothing_or_little() -> None:
    encoder = _encoder()
    assert encoder.training_windows(_history()) == ()
    assert encoder.training_windows(_history(1)) == ()
    (window,) = encoder.training_windows(_history(1, 2))
    assert window.targets.tolist() == [2, NO_TARGET]


def test_a_query_is_the_newest_items() -> None:
    encoder = _encoder()
    assert encoder.query_window(_history(0, 1, 2, 4, 0)).items.tolist() == [2, 4, 0]
    assert encoder.query_window(_history(1)).items.tolist() == [1]
    with pytest.raises(DataError, match="empty history"):
        encoder.query_window(_history())


def test_a_window_that_could_exceed_the_context_is_refused() -> None:
    """3 header tokens and 3 items of up to 8: 27."""
    assert _encoder(max_tokens=27)
    with pytest.raises(DataError, match=r"27 tokens, the backbone reads 26; lower window\.items"):
        _encoder(max_tokens=26)


def test_an_item_without_tokens_is_refused() -> None:
    class Nothing:
        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
            return {"input_ids": [[] for _ in texts]}

        def get_vocab(self) -> dict[str, int]:
            return {}

    prompt = Prompt("p", 1, "", "{title}", "{title}", ("title",))
    with pytest.raises(DataError, match="item 0 renders to no token"):
        HistoryEncoder(prompt, CATALOGUE, Nothing(), WindowConfig(items=2), 1000)


def test_a_prompt_field_that_the_catalogue_lacks_is_refused() -> None:
    prompt = Prompt("p", 1, "", "{genre}\n", "{genre}\n", ("genre",))
    with pytest.raises(DataError, match="genre"):
        _encoder(prompt)


def test_the_hash_of_windows_depends_on_tokens_and_on_where_windows_end() -> None:
    encoder = _encoder()
    one, two = encoder.window(_history(0)), encoder.window(_history(1))
    again = encoder.window(_history(0, 3), stop=1)
    assert windows_hash([one]) == windows_hash([again])
    hashes = {windows_hash(windows) for windows in ([one], [two], [one, two], [two, one], [])}
    assert len(hashes) == 5

    def bare(*tokens: int) -> Window:
        return Window(np.array(tokens, np.int32), np.zeros(0, np.int32), _history(), 0, 1)

    assert windows_hash([bare(1, 2), bare(3)]) != windows_hash([bare(1), bare(2, 3)])


def test_an_item_that_is_read_as_one_state_is_one_entry_and_names_the_item() -> None:
    encoder = _encoder(reading="items")
    window = encoder.window(_history(3, 0, 4))
    assert window.tokens.tolist() == [*map(ord, "H:\n"), -4, -1, -5]
    assert window.item_ends.tolist() == [3, 4, 5]
    assert encoder.header_tokens == [*map(ord, "H:\n")]
    assert encoder.prompt_pieces() == encoder.catalogue_pieces()


def test_the_context_holds_as_many_items_as_positions_where_items_are_read() -> None:
    _encoder(reading="items", items=100, max_tokens=103)
    with pytest.raises(DataError, match="100 items of up to 1 tokens can take 103 tokens"):
        _encoder(reading="items", items=100, max_tokens=102)


def test_a_prompt_with_ratings_has_no_text_of_an_item_alone() -> None:
    with pytest.raises(DataError, match=r"next_item\.v2") as error:
        _encoder(RATED, reading="items")
    assert "window.reading: tokens" in str(error.value)
