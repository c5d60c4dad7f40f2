"""JSON tables: an object on each line, or an array of objects."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import DataError
from pfm_llm.data.tables import BadRow, LazyColumns, Table

_BEGINNING = re.compile(r"\s*(\{|\[\s*\{)")


def read_json_lines(path: Path, text: str, encoding: str) -> Table:
    """Read JSON objects; what an object lacks is ``""``.

    A list of texts or numbers becomes one text, joined by commas. Columns in which an object or a
    list of objects stands are passed over. Lines may also be Python literals, as in the metadata
    that Amazon's reviews of 2014 come with.

    Args:
        path: The file, for messages.
        text: Its content.
        encoding: In words, for the description.

    Raises:
        DataError: The file has no object.
    """
    rows: list[dict[str, Any]] = []
    positions: list[int] = []
    bad: list[BadRow] = []
    for line, row in _objects(text):
        if isinstance(row, dict):
            rows.append(row)
            positions.append(line)
        else:
            bad.append(BadRow(line, "not a JSON object", ""))
    if not rows:
        raise DataError(f"{path} is no JSON table: it needs an object on each line, or an array")
    header = tuple(dict.fromkeys(str(name) for row in rows for name in row))
    nested = {name for row in rows for name, value in row.items() if _is_nested(value)}

    def load(name: str) -> list[str]:
        if name not in header:
            raise KeyError(name)
        if name in nested:
            raise DataError(
                f"{path}: {name!r} holds nested values and cannot be read as text; name another "
                "column in data.columns"
            )
        return [_as_text(row.get(name)) for row in rows]

    return Table(
        name=str(path),
        header=header,
        columns=LazyColumns([name for name in header if name not in nested], load),
        positions=positions,
        bad=tuple(bad),
        inferred=("a JSON object for each row", f"encoding {encoding}"),
        layout={"encoding": encoding},
    )


def is_json(text: str) -> bool:
    """Whether a text begins like an object, or like an array of objects."""
    return _BEGINNING.match(text) is not None


def _objects(text: str) -> Iterator[tuple[int, Any]]:
    """The position of each object, and the object; None where there is another thing."""
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
            return
        except json.JSONDecodeError:
            pass
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, _parsed(content)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        try:
            return ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


def _is_nested(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(entry, dict) or _is_nested_list(entry) for entry in value)
    return isinstance(value, dict)


def _is_nested_list(value: Any) -> bool:
    """Amazon's categories of 2014 are lists in a list, which are joined like one."""
    return isinstance(value, list) and _is_nested(value)


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_as_text, value)))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip()
