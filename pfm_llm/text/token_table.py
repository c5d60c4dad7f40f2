"""Tokens of texts, computed once through `datasets` and kept as a memory-mapped Arrow table.

The table holds public texts only: the items of a catalogue as a prompt renders them. A history is
put together from the tokens in the table and is never stored here.

A text is data. Where it spells a control token of the model, such as ``<|im_start|>``, it becomes
letters and not that token.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pfm_llm.base import files
from pfm_llm.base.errors import StorageError
from pfm_llm.data.arrow import no_progress_bars

FORMAT_VERSION = 2
"""Raise it when a text gets other tokens than before."""

_log = logging.getLogger(__name__)
_COLUMN = "tokens"
_FEATURES = datasets.Features({_COLUMN: datasets.Sequence(datasets.Value("int32"))})


def tokenise(texts: Sequence[str], tokenizer: Any, folder: Path) -> list[np.ndarray]:
    """Tokenise texts without special tokens, or map the table of an earlier call.

    Args:
        texts: At least one.
        tokenizer: A Hugging Face tokenizer.
        folder: The folder of the tables, each named by a key of texts and tokenizer. A table that
            cannot be written there stays in memory, with a warning.

    A table that does not match its checksum is built again.

    Returns:
        For each text its tokens, int32 [number of tokens]: a read-only view of the mapped file.
    """
    key = _key(texts, tokenizer)
    path = folder / f"{key}.arrow"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {_COLUMN: encode_letters(batch["text"], tokenizer)}

    def mapped(cache_file: str | None) -> list[np.ndarray]:
        dataset = datasets.Dataset.from_dict({"text": list(texts)}).map(
            encode,
            batched=True,
            remove_columns=["text"],
            features=_FEATURES,
            cache_file_name=cache_file,
            keep_in_memory=cache_file is None,
            new_fingerprint=key,
        )
        rows = [row for chunk in dataset.data.column(_COLUMN).chunks for row in _rows(chunk)]
        return rows

    with no_progress_bars():
        try:
            if not _is_whole(path):
                folder.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                mapped(str(path))
                files.write_text(_checksum_file(path), files.sha256_of(path))
            return mapped(str(path))
        except (OSError, StorageError) as error:
            _log.warning("tokens are not kept: %s", error)
            return mapped(None)


def encode_letters(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, none of them a control token of the tokenizer.

    A text in which the tokenizer finds no control token keeps the tokens that it gets by itself.

    Args:
        texts: Any number of texts.
        tokenizer: A Hugging Face tokenizer, slow or fast.
    """
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    control = _control_tokens(tokenizer)
    return [
        row if control.keys().isdisjoint(row) else _spelt(text, tokenizer, control)
        for text, row in zip(texts, rows, strict=True)
    ]


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id to text of the tokens that stand outside the vocabulary of words; blanks are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {key: token.content for key, token in added.items() if token.content.strip()}


def _spelt(text: str, tokenizer: Any, control: dict[int, str]) -> list[int]:
    """The tokens of a text in which the tokenizer would find control tokens."""

    def tokens(parts: Collection[str]) -> list[int]:
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        return [token for part in tokenizer(list(parts), **settings)["input_ids"] for token in part]

    # A letter that the vocabulary lacks is an unknown token, and no control token.
    forbidden = control.keys() - {getattr(tokenizer, "unk_token_id", None)}
    whole = tokens([text])
    if forbidden.isdisjoint(whole):
        return whole
    # Tokens that are added but not special are found even so, unless their text is in two parts.
    names = [name for name in control.values() if len(name) > 1]
    rests = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
    cut = tokens(re.split(rests, text))
    return cut if forbidden.isdisjoint(cut) else tokens(text)


def _is_whole(path: Path) -> bool:
    """Whether a table is there and has its checksum."""
    try:
        whole = files.sha256_of(path) == _checksum_file(path).read_text()
    except FileNotFoundError:  # not finished, or of an earlier version without checksums
        return False
    except (OSError, UnicodeDecodeError, StorageError):
        whole = False
    if not whole:
        _log.warning("%s is damaged; tokenising again", path.name)
    return whole


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _rows(chunk: Any) -> list[np.ndarray]:
    values = chunk.values.to_numpy(zero_copy_only=True)
    offsets = chunk.offsets.to_numpy()
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


def _key(texts: Sequence[str], tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {identity}".encode())
    digest.update(json.dumps(list(texts)).encode())
    return digest.hexdigest()[:32]
