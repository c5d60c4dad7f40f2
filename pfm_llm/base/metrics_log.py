"""``metrics.jsonl``: the figures of each round, one JSON line per round.

The log may become public. A record therefore takes only numbers, strings and mappings of them;
arrays and tensors are refused.

The costs of a run are sums over its log. Line n is therefore round n, and each line begins with the
CRC-32 of its rest: ``{"crc32": "0a1b2c3d", "round": 1, …}``. The lines of version 0.2 have none.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pfm_llm.base.errors import CorruptFileError, DataError, StorageError
from pfm_llm.base.files import storage_errors, write_text

_CHECKSUM = "crc32"
_BEFORE, _AFTER = b'{"crc32": "', b'", '
_WITHOUT = b'{"round": '
"""The beginning of a line, around its checksum, and that of a line without one."""


class MetricsLog:
    """One JSON object per line; line n has the figures of round n.

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
            CorruptFileError: A line before a half-written last one is damaged.
            StorageError: The line cannot be written.
        """
        line = _to_line(record)
        content = self._content()
        if content and not content.endswith(b"\n"):
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

        Raises:
            CorruptFileError: A line is damaged, or a round to keep is missing.
            StorageError: The file cannot be read or written.
        """
        if self._content() or round_number:
            self._rewrite(self.read(round_number))

    def read(self, last_round: int | None = None) -> list[dict[str, Any]]:
        """The records of rounds 1, 2, …; empty when there is no file.

        Args:
            last_round: The last round to read; None: all whole records.

        Raises:
            CorruptFileError: A line other than a half-written last one is damaged or belongs to
                another round, or a round up to ``last_round`` is missing.
            StorageError: The file cannot be read.
        """
        *lines, tail = self._content().split(b"\n")
        records = [self._parse(line, number) for number, line in enumerate(lines, start=1)]
        # A prefix of a JSON object never parses, so a last line that parses is complete.
        if _record_of(tail) is not None:
            records.append(self._parse(tail, len(lines) + 1))
        if last_round is not None and len(records) < last_round:
            raise CorruptFileError(
                f"{self.path} ends after round {len(records)} and lacks the rounds up to "
                f"{last_round}; restore it from a backup, or start the run again"
            )
        return records[:last_round]

    def total(self, name: str, records: Iterable[Mapping[str, Any]]) -> Any:
        """The sum of a figure over some records of this log.

        Raises:
            CorruptFileError: A record lacks the figure, or holds something else than a number.
        """
        try:
            return sum(record[name] for record in records)
        except (KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{self.path}: a record holds no number {name!r}; restore the file from a backup, "
                "or start the run again"
            ) from error

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        record = _record_of(line)
        if record is None:
            raise CorruptFileError(
                f"{self.path}, line {number}: damaged, not the record of a round; restore the file "
                "from a backup, or start the run again"
            )
        if record["round"] != number:
            raise CorruptFileError(
                f"{self.path}, line {number}: holds round {record['round']}, must be round "
                f"{number}; lines are missing, repeated or in another order: restore the file from "
                "a backup, or start the run again"
            )
        return record

    def _rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.path, "".join(_to_line(record) for record in records))


def _to_line(record: Mapping[str, Any]) -> str:
    if type(record.get("round")) is not int:
        raise DataError(f"metrics record without an integer 'round': keys {sorted(record)}")
    plain = _plain({name: value for name, value in record.items() if name != _CHECKSUM}, "record")
    rest = json.dumps(plain, allow_nan=False)[1:].encode()
    return f"{_BEFORE.decode()}{zlib.crc32(rest):08x}{_AFTER.decode()}{rest.decode()}\n"


def _record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line, without its checksum; None for a line that is damaged."""
    rest = line.removeprefix(_BEFORE)
    if rest != line:
        given, rest = rest[:8], rest[8:].removeprefix(_AFTER)
        if given != f"{zlib.crc32(rest):08x}".encode():
            return None
        line = b"{" + rest
    elif not line.startswith(_WITHOUT):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(record, dict) and type(record.get("round")) is int
    return record if sound else None


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
