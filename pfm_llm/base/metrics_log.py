"""``metrics.jsonl``: the figures of each round, one JSON line per round.

The log may become public. A record therefore takes only numbers, strings and mappings of them;
arrays and tensors are refused.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.files import storage_errors, write_text


class MetricsLog:
    """One JSON object per line, each with the ``round`` that it belongs to.

    A process may be killed at any byte, so a half-written last line is ignored.

    Args:
        path: The file; it and its folder need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and force it to disk. Numbers that are not finite become ``null``.

        Args:
            record: Numbers, strings, ``None`` and mappings of them; must hold an integer
                ``round``.

        Raises:
            DataError: There is no ``round``, or a value is a sequence, array or tensor.
            StorageError: The line cannot be written.
        """
        line = _to_line(record)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(self.read())
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

    def truncate_after(self, round_number: int) -> None:
        """Drop the records of later rounds, and a half-written last line.

        Args:
            round_number: The last round to keep; 0 keeps none of the rounds from 1 on.
        """
        if self.path.exists():
            self._rewrite(record for record in self.read() if record["round"] <= round_number)

    def read(self) -> list[dict[str, Any]]:
        """All whole records, oldest first; empty when there is no file.

        Raises:
            CorruptFileError: A line other than a half-written last one is not a record.
        """
        if not self.path.exists():
            return []
        *lines, tail = self.path.read_bytes().split(b"\n")
        records = [self._parse(line, number) for number, line in enumerate(lines, start=1)]
        # A prefix of a JSON object never parses, so a last line that parses is complete.
        try:
            return [*records, self._parse(tail, len(lines) + 1)]
        except CorruptFileError:
            return records

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("round"), int):
            raise CorruptFileError(
                f"{self.path}, line {number}: not a JSON object with a round; delete the line"
            )
        return record

    def _rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.path, "".join(_to_line(record) for record in records))


def _to_line(record: Mapping[str, Any]) -> str:
    if not isinstance(record.get("round"), int):
        raise DataError(f"metrics record without an integer 'round': keys {sorted(record)}")
    return json.dumps(_plain(record, "record"), allow_nan=False) + "\n"


def _plain(value: Any, name: str) -> Any:
    """Plain JSON types by allow-list, so that no client's array gets into the log."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DataError(
        f"metrics {name} is a {type(value).__name__}; log numbers, strings or mappings of them"
    )
