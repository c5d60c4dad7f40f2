"""Questions about many items after one history, as one row of tokens.

All questions after a history begin alike. A row has the tokens of the history once, and then those
of each question. A question sees the history and itself, and its first token has the position that
follows the history, as if it stood there alone::

    history | question 1 | question 2 | ...
    0 1 2 3 | 4 5 6      | 4 5        | ...

So a pass reads the history once for all of a user's items, in any Hugging Face decoder with
relative positions, with gradients, and for many users at a time. Nothing is cached.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm_llm.base import assets
from pfm_llm.base.errors import DataError
from pfm_llm.config.model import DETAILED_TOKENS, PositiveCount, Settings
from pfm_llm.data.history import NO_LABEL, Query
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.questions import WOULD_LIKE, QuestionPrompt
from pfm_llm.text.token_table import tokenise

_TOKENS_OF_A_ROW = 1024
"""Where the questions of a user take more, they are spread over rows: attention grows with the
square of a row, and each row reads the history again."""


class QuestionSettings(Settings):
    """What the likelihood scorer reads."""

    prompt: str = WOULD_LIKE
    shown_items: PositiveCount = 10
    max_item_tokens: PositiveCount = 32


@dataclass(frozen=True, eq=False)
class QuestionRow:
    """A history and J questions after it.

    Attributes:
        tokens: int32 [T].
        places: int32 [T], the position of each token.
        parts: int32 [T], 0 in the history and j in question j, from 1.
        ends: int32 [J], index of the last token of each question.
        liked: int8 [J], the answer to each, 1 or 0, or `NO_LABEL`.
    """

    tokens: np.ndarray
    places: np.ndarray
    parts: np.ndarray
    ends: np.ndarray
    liked: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def prompts(self) -> list[list[int]]:
        """The tokens of each question with the history before it, for a runtime without masks."""
        parts = range(1, len(self) + 1)
        return [self.tokens[(self.parts == 0) | (self.parts == j)].tolist() for j in parts]


class QuestionEncoder:
    """Renders and tokenises questions.

    Args:
        prompt: The prompt.
        catalogue: The items.
        tokenizer: A Hugging Face tokenizer.
        settings: How much is shown.
        max_tokens: The backbone's context length.

    Attributes:
        answers: The tokens of yes and of no.
        prompt_hash: Identity of the prompt.
        settings: As given.

    Raises:
        ConfigError: An answer is not a single token.
        DataError: The catalogue lacks a field of the prompt, or a question may exceed the context.
    """

    def __init__(
        self,
        prompt: QuestionPrompt,
        catalogue: Catalogue,
        tokenizer: Any,
        settings: QuestionSettings,
        max_tokens: int,
    ) -> None:
        self.answers = prompt.answer_tokens(tokenizer)
        self.prompt_hash = prompt.content_hash()
        self.settings = settings
        fields = prompt.fields_of(catalogue)
        cache = assets.cache_dir() / "tokens"
        self._items = _cut(
            tokenise([prompt.render_item(one) for one in fields], tokenizer, cache),
            settings.max_item_tokens,
        )
        self._questions = _cut(
            tokenise([prompt.render_question(one) for one in fields], tokenizer, cache),
            settings.max_item_tokens + DETAILED_TOKENS,
        )
        # These are their author's texts and may hold control tokens; texts of items may not.
        plain = [prompt.header, prompt.liked, prompt.disliked, prompt.answer]
        found = tokenizer(plain, add_special_tokens=False)["input_ids"]
        self._header, self._liked, self._disliked, self._answer = (
            np.asarray(tokens, np.int32) for tokens in found
        )
        longest = sum(map(len, found)) + settings.shown_items * settings.max_item_tokens
        longest += max(map(len, self._questions), default=0)
        if longest > max_tokens:
            raise DataError(
                f"a question after {settings.shown_items} items can take {longest} tokens, the "
                f"backbone reads {max_tokens}; lower shown_items or max_item_tokens"
            )

    def rows(self, query: Query) -> list[QuestionRow]:
        """The questions about the targets of a query, in their order, in as few rows as fit.

        Args:
            query: Its history shows the newest of its items that have a label.

        Raises:
            DataError: The query has no target.
        """
        if not len(query.targets):
            raise DataError(f"user {query.user} has no item in question")
        history = self._history(query)
        labels = np.full(len(query.targets), NO_LABEL) if query.liked is None else query.liked
        pieces = [np.append(self._questions[item], self._answer) for item in query.targets]
        found, start = [], 0
        while start < len(pieces):
            stop, length = start + 1, len(history) + len(pieces[start])
            while stop < len(pieces) and length + len(pieces[stop]) <= _TOKENS_OF_A_ROW:
                length += len(pieces[stop])
                stop += 1
            found.append(pack(history, pieces[start:stop], labels[start:stop]))
            start = stop
        return found

    def _history(self, query: Query) -> np.ndarray:
        """The tokens before a question."""
        labels = query.history.labels
        newest = np.flatnonzero(labels != NO_LABEL)[-self.settings.shown_items :]
        tokens = [self._header]
        for heading, label in ((self._liked, 1), (self._disliked, 0)):
            items = query.history.items[newest[labels[newest] == label]]
            if len(items):
                tokens += [heading, *(self._items[item] for item in items)]
        return np.concatenate(tokens)


def pack(history: np.ndarray, pieces: Sequence[np.ndarray], liked: np.ndarray) -> QuestionRow:
    """One row of the tokens of a history and of the pieces after it; ``liked`` is [pieces]."""
    lengths = np.array([len(piece) for piece in pieces])
    first = len(history)
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    asked = np.arange(lengths.sum()) - starts
    parts = np.repeat(np.arange(1, len(pieces) + 1), lengths)
    return QuestionRow(
        tokens=np.concatenate([history, *pieces]).astype(np.int32),
        places=np.concatenate([np.arange(first), first + asked]).astype(np.int32),
        parts=np.concatenate([np.zeros(first, np.int64), parts]).astype(np.int32),
        ends=(first + lengths.cumsum() - 1).astype(np.int32),
        liked=liked.astype(np.int8),
    )


def _cut(pieces: Sequence[np.ndarray], longest: int) -> list[np.ndarray]:
    """The pieces, of which long ones lose tokens before their last one."""
    return [
        piece if len(piece) <= longest else np.append(piece[: longest - 1], piece[-1])
        for piece in pieces
    ]
