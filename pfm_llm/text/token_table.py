"""Tokens of texts, computed once through `datasets` and kept as a memory-mapped Arrow table.

The table holds public texts only: the items of a catalogue as a prompt renders them. A history is
put together from the tokens in the table and is never stored here.
"""

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

_log = logging.getLogger(__name__)
_COLUMN = "tokens"
_FEATURES = datasets.Features({_COLUMN: datasets.Sequence(datasets.Value("int32"))})


class TokenTable:
    """Token ids of some texts, by index.

    Args:
        dataset: A `datasets.Dataset` with one column of int32 lists.
    """

    def __init__(self, dataset: Any) -> None:
        chunks = dataset.data.column(_COLUMN).chunks
        # Views of the mapped file; a row is read from disk when it is used.
        self._rows = [row for chunk in chunks for row in _rows(chunk)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of a text, int32 [number of tokens], read-only."""
        return self._rows[index]


def tokenise(texts: Sequence[str], tokenizer: Any, folder: Path) -> TokenTable:
    """Tokenise texts without special tokens, or map the table of an earlier call.

    Args:
        texts: At least one.
        tokenizer: A Hugging Face tokenizer.
        folder: Where tables are kept, each under a key of texts and tokenizer. When it cannot be
            written the table stays in memory, with a warning.
    """
    key = _key(texts, tokenizer)
    path = folder / f"{key}.arrow"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {_COLUMN: tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def mapped(cache_file: str | None) -> TokenTable:
        dataset = datasets.Dataset.from_dict({"text": list(texts)}).map(
            encode,
            batched=True,
            remove_columns=["text"],
            features=_FEATURES,
            cache_file_name=cache_file,
            keep_in_memory=cache_file is None,
            new_fingerprint=key,
        )
        table = TokenTable(dataset)
        if len(table) != len(texts):
            raise pa.ArrowInvalid(f"{len(table)} of {len(texts)} texts")
        return table

    with _no_progress_bars():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                return mapped(str(path))
            except pa.ArrowException as error:
                _log.warning("%s is damaged (%s); tokenising again", path.name, error)
                path.unlink(missing_ok=True)
                return mapped(str(path))
        except OSError as error:
            _log.warning("tokens are not kept: %s", error.strerror or error)
            return mapped(None)


def _rows(chunk: Any) -> Iterator[np.ndarray]:
    values = chunk.values.to_numpy(zero_copy_only=True)
    offsets = chunk.offsets.to_numpy()
    return (values[start:stop] for start, stop in itertools.pairwise(offsets))


def _key(texts: Sequence[str], tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(identity.encode())
    digest.update(json.dumps(list(texts)).encode())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
