"""Histories as token windows with item ends.

An item's text is tokenised by itself and the pieces are concatenated, so the last token of
each item is known exactly and a text is tokenised once, however often it occurs. Position
``j`` of a window is its ``j``-th item; the state there predicts the item after it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base import assets
from pfm_llm.base.errors import DataError
from pfm_llm.config.model import WindowConfig
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.prompts import Prompt
from pfm_llm.text.token_table import tokenise

NO_TARGET = -1
NO_LABEL = -1


@dataclass(frozen=True)
class Window:
    """One pass over a stretch of one history.

    Attributes:
        tokens: int32 [T], the rendered text.
        item_ends: int32 [L], index in ``tokens`` of each item's last token, ascending.
        items: int32 [L], the item at each position.
        targets: int32 [L], the next item, or `NO_TARGET` where there is none to learn from.
        liked: int8 [L], whether the user liked that next item, 0 or 1, or `NO_LABEL`.
        before: int32 [S], the items of the history that come before the window.
    """

    tokens: np.ndarray
    item_ends: np.ndarray
    items: np.ndarray
    targets: np.ndarray
    liked: np.ndarray
    before: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_targets(self) -> int:
        """How many predictions this window trains."""
        return int((self.targets != NO_TARGET).sum())

    @property
    def met(self) -> np.ndarray:
        """All that the history holds up to the window's last target, int32, oldest first."""
        last = self.targets[-1:]
        return np.concatenate([self.before, self.items, last[last != NO_TARGET]])


def windows_hash(windows: Sequence[Window]) -> str:
    """Hash of the tokens of some windows, in hex: what a cached trunk state depends on."""
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
        rating_values: The ratings that histories may show; others are tokenised when they come.

    Raises:
        DataError: The catalogue lacks a field of the prompt, or a whole window of the longest
            items does not fit into the context.
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
        prompt.check_fields(catalogue)
        self.config = config
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._fields = [
            {name: catalogue.fields[name][i] for name in prompt.fields if name in catalogue.fields}
            for i in range(len(catalogue))
        ]
        self._pieces = self._tokenise_pieces(rating_values if prompt.uses_rating else (None,))
        self._header = self._encode([prompt.header])[0] if prompt.header else []
        longest = len(self._header) + config.items * config.max_item_tokens
        if longest > max_tokens:
            raise DataError(
                f"a window of {config.items} items of up to {config.max_item_tokens} tokens can "
                f"take {longest} tokens, the backbone reads {max_tokens}; lower window.items or "
                "window.max_item_tokens"
            )

    def catalogue_pieces(self) -> list[list[int]]:
        """Token ids of every item rendered by itself, for the frozen item embeddings."""
        texts = [self._prompt.render_catalogue_item(fields) for fields in self._fields]
        table = tokenise(texts, self._tokenizer, _tables_folder())
        return [self._cut(table[item], item).tolist() for item in range(len(texts))]

    def window(
        self,
        items: np.ndarray,
        ratings: np.ndarray | None = None,
        targets: np.ndarray | None = None,
        liked: np.ndarray | None = None,
        before: np.ndarray | None = None,
    ) -> Window:
        """Encode a stretch of a history as one window.

        Args:
            items: int [L], oldest first, L >= 1.
            ratings: float [L], where the prompt shows them.
            targets: int [L]; all `NO_TARGET` when None.
            liked: int [L], labels of the targets; all `NO_LABEL` when None.
            before: int [S], what the history holds before the stretch; nothing when None.

        Raises:
            DataError: The stretch is empty.
        """
        if len(items) == 0:
            raise DataError("an empty history cannot be encoded: it has no item to read")
        pieces = [
            self._piece(int(item), None if ratings is None else float(ratings[j]))
            for j, item in enumerate(items)
        ]
        header = np.asarray(self._header, dtype=np.int32)
        ends = len(header) + np.cumsum([len(piece) for piece in pieces]) - 1
        if targets is None:
            targets = np.full(len(items), NO_TARGET)
        if liked is None:
            liked = np.full(len(items), NO_LABEL)
        return Window(
            tokens=np.concatenate([header, *pieces]),
            item_ends=ends.astype(np.int32),
            items=np.asarray(items, dtype=np.int32),
            targets=np.asarray(targets, dtype=np.int32),
            liked=np.asarray(liked, dtype=np.int8),
            before=np.asarray([] if before is None else before, dtype=np.int32),
        )

    def training_windows(
        self,
        items: np.ndarray,
        ratings: np.ndarray | None = None,
        liked: np.ndarray | None = None,
        num_known: int = 0,
    ) -> tuple[Window, ...]:
        """Cut a training history into windows that end with its last item.

        Every transition is a target exactly once: the last position of a window predicts the
        first item of the next. A history of fewer than two items trains nothing and gives no
        window.

        A history that grew is not cut anew: windows with ``num_known`` go beside those of its
        first items. The newest of them shows the same items as the query, unless it is long.

        Args:
            items: int [n], the training history, oldest first.
            ratings: float [n], where the prompt shows them.
            liked: bool [n], whether the user liked each item, where likes are learned.
            num_known: How many of the first items other windows have as targets, or as the
                first item of all; they are none here.

        Returns:
            Windows, oldest first; the newest ``max_windows`` of them.
        """
        if len(items) < 2:
            return ()
        targets = np.append(items[1:], NO_TARGET)
        targets[: max(num_known - 1, 0)] = NO_TARGET
        labels = None if liked is None else np.append(liked[1:].astype(np.int8), NO_LABEL)
        size = self.config.items
        spans = [slice(max(0, stop - size), stop) for stop in range(len(items), 0, -size)]
        # Without a target: all is known, or the newest window is one item long.
        spans = [span for span in spans if (targets[span] != NO_TARGET).any()]
        return tuple(
            self.window(
                items[s],
                None if ratings is None else ratings[s],
                targets[s],
                None if labels is None else labels[s],
                items[: s.start],
            )
            for s in reversed(spans[: self.config.max_windows])
        )

    def query_window(self, items: np.ndarray, ratings: np.ndarray | None = None) -> Window:
        """The newest stretch of a history, whose last state ranks the catalogue."""
        size = self.config.items
        return self.window(items[-size:], None if ratings is None else ratings[-size:])

    def _piece(self, item: int, rating: float | None) -> np.ndarray:
        key = (item, rating if self._prompt.uses_rating else None)
        if key not in self._pieces:
            text = self._prompt.render_item(self._fields[item], key[1])
            self._pieces[key] = self._cut(np.asarray(self._encode([text])[0], np.int32), item)
        return self._pieces[key]

    def _tokenise_pieces(
        self, ratings: Sequence[float | None]
    ) -> dict[tuple[int, float | None], np.ndarray]:
        keys = [(item, rating) for rating in ratings for item in range(len(self._fields))]
        if not keys:
            return {}
        texts = [self._prompt.render_item(self._fields[item], rating) for item, rating in keys]
        table = tokenise(texts, self._tokenizer, _tables_folder())
        return {key: self._cut(table[row], key[0]) for row, key in enumerate(keys)}

    def _cut(self, piece: np.ndarray, item: int) -> np.ndarray:
        if not len(piece):
            raise DataError(f"item {item} renders to no token; give it a text")
        if len(piece) > self.config.max_item_tokens:
            # Keep the end token of the piece, so that an item always ends alike.
            return np.append(piece[: self.config.max_item_tokens - 1], piece[-1])
        return piece

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded


def _tables_folder() -> Path:
    return assets.cache_dir() / "tokens"
