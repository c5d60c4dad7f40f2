"""Ranked lists in the formats that other evaluation tools read: TREC files and Parquet.

Our metrics have one relevant item each, so every target is a query of its own. The name of a query
is the user's id, followed by ``#2``, ``#3`` and so on from the user's second target on. Ids are
percent-encoded, because spaces part the columns of a TREC file.

A tie counts against a target, which is therefore the last of the items with its score. Tools sort
by score and break ties in their own way, so the files hold scores without ties: ``n`` for the first
of ``n`` listed items, and 1 for the last.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pfm_llm.base import files
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation.candidates import PADDING
from pfm_llm.evaluation.ranking import Ranks

QRELS = "qrels"
"""Name of the files with the targets: ``qrels.txt`` and ``qrels.parquet``."""

# ranx wants whole numbers for relevance and fractions for scores.
_RELEVANCE, _SCORE = pa.int64(), pa.float64()
_Line = tuple[str, str, int]


def write_ranked(
    folder: Path,
    held_out: HeldOut,
    ranks: Mapping[str, Ranks],
    user_ids: Sequence[str],
    item_ids: Sequence[str],
) -> None:
    """Write the targets, and the list that each method or mode gives for each target.

    ``qrels.txt`` and ``<name>.txt`` are TREC files. ``qrels.parquet`` and ``<name>.parquet`` have
    the columns ``q_id``, ``doc_id`` and ``score``, as ranx reads them: a score is int64 in the
    first and float64 in the second.

    Args:
        folder: Created, and readable by its owner alone, since a list is somebody's.
        held_out: The queries.
        ranks: Per method or mode its ranks of all targets, with lists.
        user_ids: External id of each user.
        item_ids: External id of each item.

    Raises:
        StorageError: A file cannot be written.
    """
    queries = list(_queries(held_out, user_ids))
    items = [_encoded(item) for item in item_ids]
    targets = np.concatenate([np.zeros(0, np.int64), *held_out.targets]).tolist()
    relevant = [(query, items[item], 1) for query, item in zip(queries, targets, strict=True)]
    files.make_private_dir(folder)
    lines = (f"{query} 0 {item} 1" for query, item, _ in relevant)
    _write(folder / QRELS, relevant, lines, _RELEVANCE)
    for name, own in ranks.items():
        assert own.lists is not None
        listed = list(_listed(queries, own.lists, items))
        lines = (f"{q} Q0 {i} {rank} {score} {name}" for (q, i, score), rank in listed)
        _write(folder / name, [line for line, _ in listed], lines, _SCORE)


def _queries(held_out: HeldOut, user_ids: Sequence[str]) -> Iterator[str]:
    """The name of each target's query."""
    for user, targets in zip(held_out.users.tolist(), held_out.targets, strict=True):
        name = _encoded(user_ids[user])
        yield from (name if n == 1 else f"{name}#{n}" for n in range(1, len(targets) + 1))


def _listed(
    queries: Sequence[str], lists: np.ndarray, items: Sequence[str]
) -> Iterator[tuple[_Line, int]]:
    """Every listed item of every query with its score, and its rank."""
    for query, own in zip(queries, lists.tolist(), strict=True):
        shown = [item for item in own if item != PADDING]
        for rank, item in enumerate(shown, 1):
            yield (query, items[item], len(shown) + 1 - rank), rank


def _write(path: Path, table: Sequence[_Line], lines: Iterable[str], kind: pa.DataType) -> None:
    files.write_text(path.with_name(f"{path.name}.txt"), "".join(f"{line}\n" for line in lines))
    buffer = io.BytesIO()
    schema = pa.schema({"q_id": pa.string(), "doc_id": pa.string(), "score": kind})
    columns = zip(*table, strict=True) if table else ((), (), ())
    arrays = [pa.array(own, one.type) for own, one in zip(columns, schema, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    files.write_bytes(path.with_name(f"{path.name}.parquet"), buffer.getvalue())


def _encoded(text: str) -> str:
    return quote(text, safe="")
