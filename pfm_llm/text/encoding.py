"""Histories as token windows with item ends.

Each item's text is tokenised separately and the pieces are concatenated. The last token of each
item is therefore known exactly, and each text is tokenised once, however often it occurs. Position
``j`` of a window is its ``j``-th item; the state at its last token predicts the next item.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm_llm.base import assets
from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import Reading
from pfm_llm.config.model import DETAILED_TOKENS, WindowConfig
from pfm_llm.data.history import NO_LABEL, History
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.prompts import Prompt
from pfm_llm.text.token_table import encode_letters, tokenise

NO_TARGET = -1


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one history that the model reads in one pass.

    Position j of the window is item ``start + j`` of the history. Its target is the next item of
    the history, if that is one of ``history[first_target:]``.

    Attributes:
        tokens: int32 [T], the rendered text. Where an item is read as one state it is one entry,
            -1 - i for item i, which is no token.
        item_ends: int32 [L], index in ``tokens`` of each item's last token, ascending.
        history: The history that the stretch is part of.
        start: The number of items of the history before the window.
        first_target: Items of the history before this one are no targets here.
    """

    tokens: np.ndarray
    item_ends: np.ndarray
    history: History
    start: int
    first_target: int

    def __len__(self) -> int:
        return len(self.item_ends)

    @property
    def items(self) -> np.ndarray:
        """Int [L], the item at each position."""
        return self.history.items[self.start : self.start + len(self)]

    @functools.cached_property
    def has_target(self) -> np.ndarray:
        """Bool [L], whether each position has a target."""
        place = self.start + 1 + np.arange(len(self))
        return (place >= self.first_target) & (place < len(self.history))

    @property
    def targets(self) -> np.ndarray:
        """int32 [L], the item after each position, or `NO_TARGET`."""
        return self._following(self.history.items.astype(np.int32), NO_TARGET)

    @property
    def liked(self) -> np.ndarray:
        """int8 [L], whether the user liked the target, 0 or 1, or `NO_LABEL`."""
        return self._following(self.history.labels, NO_LABEL)

    @property
    def num_targets(self) -> int:
        """The number of positions that have a target."""
        return int(self.has_target.sum())

    @property
    def met(self) -> np.ndarray:
        """Int [H], the history up to the last target of the window, or up to its last item."""
        return self.history.items[: self.start + len(self) + bool(self.has_target[-1:].any())]

    def _following(self, values: np.ndarray, missing: int) -> np.ndarray:
        following = np.full(len(self), missing, values.dtype)
        (position,) = np.nonzero(self.has_target)
        following[position] = values[self.start + 1 + position]
        return following


def windows_hash(windows: Sequence[Window]) -> str:
    """Hash, in hex, of the tokens of some windows, on which their cached trunk states depend."""
    digest = hashlib.blake2b(digest_size=16)
    for window in windows:
        digest.update(len(window.tokens).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(window.tokens, dtype=np.int32).tobytes())
    return digest.hexdigest()


class HistoryEncoder:
    """Renders and tokenises histories.

    Args:
        prompt: The template.
        catalogue: The items.
        tokenizer: A Hugging Face tokenizer.
        config: Window lengths.
        max_tokens: The backbone's context length.
        rating_values: The ratings that histories may show; others are tokenised when they occur.

    Raises:
        DataError: The catalogue lacks a field of the prompt, an item has no text, all items have
            one text, or a whole window of the longest items does not fit into the context.
    """

    def __init__(
        self,
        prompt: Prompt,
        catalogue: Catalogue,
        tokenizer: Any,
        config: WindowConfig,
        max_tokens: int,
        rating_values: Sequence[float] = (),
    ) -> None:
        self.config = config
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._fields = prompt.fields_of(catalogue)
        self._texts = prompt.catalogue_texts(catalogue)
        self._reads_items = config.reading is Reading.ITEMS
        if self._reads_items and prompt.uses_rating:
            raise DataError(
                f"prompt {prompt.key} shows ratings, and window.reading: items reads an item's "
                "text without its user; set window.reading: tokens, or choose a prompt without "
                "ratings such as next_item.v2"
            )
        ratings = rating_values if prompt.uses_rating else (None,)
        keys = [(item, rating) for rating in ratings for item in range(len(catalogue))]
        if self._reads_items:
            pieces = self._by_itself()
        else:
            texts = [prompt.render_item(self._fields[item], rating) for item, rating in keys]
            pieces = self._tokenise(texts, [item for item, _ in keys]) if keys else []
        self._pieces = dict(zip(keys, pieces, strict=True))
        # The header is its author's text and may hold control tokens; texts of items may not.
        (header,) = tokenizer([prompt.header], add_special_tokens=False)["input_ids"]
        self._header = np.asarray(header, np.int32)
        of_item = 1 if self._reads_items else config.max_item_tokens
        longest = len(self._header) + config.items * of_item
        if longest > max_tokens:
            raise DataError(
                f"a window of {config.items} items of up to {of_item} tokens can "
                f"take {longest} tokens, the backbone reads {max_tokens}; lower window.items or "
                "window.max_item_tokens"
            )

    @property
    def header_tokens(self) -> list[int]:
        """Token ids of the text before the first item."""
        return [int(token) for token in self._header]

    @property
    def mean_tokens(self) -> float:
        """Tokens of an item of a history, on the mean over the catalogue."""
        return sum(map(len, self._pieces.values())) / max(len(self._pieces), 1)

    def catalogue_texts(self) -> list[str]:
        """The text of every item by itself, which becomes its vector."""
        return list(self._texts)

    def catalogue_pieces(self, max_tokens: int | None = None) -> list[list[int]]:
        """Token ids of `catalogue_texts`, each of at most ``max_tokens``; see `ItemsConfig`."""
        return [piece.tolist() for piece in self._by_itself(max_tokens)]

    def prompt_pieces(self) -> list[list[int]]:
        """Token ids of every item as a history without ratings shows it, or as it is read alone."""
        items = range(len(self._fields))
        if self._prompt.uses_rating:
            texts = [self._prompt.render_item(fields, None) for fields in self._fields]
            return [piece.tolist() for piece in self._tokenise(texts, items)]
        return [self._pieces[item, None].tolist() for item in items]

    def window(
        self, history: History, start: int = 0, stop: int | None = None, first_target: int = 1
    ) -> Window:
        """Encode a stretch of a history as one window.

        Args:
            history: Oldest item first; its ratings are needed where the prompt shows them.
            start: The number of items of the history before the stretch.
            stop: The number of items up to the end of the stretch; None: all.
            first_target: See `Window`.

        Raises:
            DataError: The stretch is empty.
        """
        part = history[slice(start, stop)]
        if not len(part):
            raise DataError("an empty history cannot be encoded: it has no item to read")
        ratings = part.ratings
        if self._reads_items:
            pieces = list(-1 - part.items.astype(np.int32)[:, None])
        else:
            pieces = [
                self._piece(int(item), None if ratings is None else float(ratings[j]))
                for j, item in enumerate(part.items)
            ]
        ends = len(self._header) + np.cumsum([len(piece) for piece in pieces]) - 1
        tokens = np.concatenate([self._header, *pieces])
        return Window(tokens, ends.astype(np.int32), history, start, first_target)

    def training_windows(self, history: History, num_known: int = 0) -> tuple[Window, ...]:
        """Cut a training history into windows that end with its last item.

        Every transition is a target exactly once: the last position of a window predicts the
        first item of the next window. A history of fewer than two items has no transition and
        gives no window.

        When a history has grown, its old windows stay. A call with ``num_known`` gives further
        windows, whose targets are the new items only. The newest of them shows the same items as
        the query, unless there are many new items.

        Args:
            history: The training history.
            num_known: Number of first items that the old windows cover; they are no targets here.

        Returns:
            Windows, oldest first; the newest ``max_windows`` of them.
        """
        size, first = self.config.items, max(num_known, 1)
        stops = range(len(history), 0, -size)
        spans = [(max(0, stop - size), stop) for stop in stops]
        # A window has no target if all its items are known, or if it is one item long.
        spans = [s for s in spans if max(s[0] + 1, first) < min(s[1] + 1, len(history))]
        newest = spans[: self.config.max_windows]
        return tuple(self.window(history, *span, first) for span in reversed(newest))

    def query_window(self, history: History) -> Window:
        """The newest stretch of a history, whose last state ranks the catalogue."""
        start = max(0, len(history) - self.config.items)
        return self.window(history, start, first_target=len(history))

    def _piece(self, item: int, rating: float | None) -> np.ndarray:
        key = (item, rating if self._prompt.uses_rating else None)
        if key not in self._pieces:
            text = self._prompt.render_item(self._fields[item], key[1])
            (tokens,) = encode_letters([text], self._tokenizer)
            self._pieces[key] = self._cut(np.asarray(tokens, np.int32), item)
        return self._pieces[key]

    def _by_itself(self, max_tokens: int | None = None) -> list[np.ndarray]:
        texts = self.catalogue_texts()
        if max_tokens is None and self._prompt.uses_details:
            max_tokens = DETAILED_TOKENS
        return self._tokenise(texts, range(len(texts)), max_tokens)

    def _tokenise(
        self, texts: Sequence[str], items: Sequence[int], max_tokens: int | None = None
    ) -> list[np.ndarray]:
        """The tokens of each text, cut to length; ``items`` are the items of the texts."""
        rows = tokenise(texts, self._tokenizer, assets.cache_dir() / "tokens")
        return [self._cut(row, item, max_tokens) for row, item in zip(rows, items, strict=True)]

    def _cut(self, piece: np.ndarray, item: int, max_tokens: int | None = None) -> np.ndarray:
        longest = max_tokens or self.config.max_item_tokens
        if not len(piece):
            raise DataError(f"item {item} renders to no token; give it a text")
        if len(piece) > longest:
            # Keep the end token of the piece, so that an item always ends alike.
            return np.append(piece[: longest - 1], piece[-1])
        return piece
