"""Tables in memory as sources: a pandas DataFrame or a `datasets.Dataset`."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pfm_llm.base import assets, files
from pfm_llm.base.errors import DataError
from pfm_llm.config.schema import parse_config
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.tables import check_header

_IN_SECTION = ("source", "items")


def load_dataset(source: Any, *, items: Any = None, **columns: str | None) -> Interactions:
    """Load interactions as training does.

    Args:
        source: A pandas DataFrame, a `datasets.Dataset`, or what ``data.source`` takes: a CSV,
            TSV, JSON or Parquet file, a folder, the id of a data set, ``movielens-100k``.
        items: The texts of the items, in any of these forms; None: ``source`` has them.
        columns: Role to its column, such as ``user="reader"``; see `ColumnsConfig`. Usual names
            are recognised.

    Raises:
        ConfigError: A name in ``columns`` is no role.
        DataError: The source cannot be read, or no interaction is left.

    Example:
        >>> import pandas as pd
        >>> from pfm_llm import load_dataset
        >>> rows = [("ann", "tea", "Tea"), ("ann", "jam", "Jam"), ("ann", "bun", "Bun")]
        >>> frame = pd.DataFrame(rows, columns=["who", "item_id", "title"])
        >>> load_dataset(frame, user="who", timestamp=None).catalogue.item_ids
        ('tea', 'jam', 'bun')
    """
    section = {**data_section(source), **data_section({"items": items}), "columns": columns}
    config = parse_config({"name": "data", "data": section}, origin="load_dataset")
    return load_interactions(config.data, config.seed)[0]


def data_section(data: Any) -> dict[str, Any]:
    """The section ``data`` of a config.

    Args:
        data: A value of ``data.source``, a table in memory, or a mapping: the section itself,
            whose ``source`` and ``items`` may be tables in memory.

    Returns:
        The section. Paths have taken the place of tables in memory.

    Raises:
        DataError: The data are of another type.
        StorageError: A table in memory cannot be written.
    """
    if isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        return {k: _place(v) if k in _IN_SECTION else v for k, v in data.items()}
    return {"source": _place(data)}


def _place(data: Any) -> str | None:
    """The name or path of a table. A table in memory is first written to the user's own cache.

    The file is named by its content, so that a run finds it again when it is evaluated or resumed.
    """
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    buffer = io.BytesIO()
    pq.write_table(_as_arrow(data).replace_schema_metadata(None), buffer)
    content = buffer.getvalue()
    folder = files.make_private_dir(assets.cache_dir() / "frames")
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    if not path.exists():
        files.write_bytes(path, content)
    return str(path)


def _as_arrow(data: Any) -> pa.Table:
    if isinstance(data, pd.DataFrame):
        return _of_frame(data)
    if isinstance(data, datasets.Dataset):
        return data.with_format("arrow")[:]
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"data have the splits {', '.join(data)}; give one of them")
    raise DataError(
        f"data of type {type(data).__name__}: give a path, a pandas DataFrame or a datasets.Dataset"
    )


def _of_frame(frame: Any) -> pa.Table:
    """A frame as Arrow; named levels of its index are columns, mixed types become text."""
    levels = [name for name in frame.index.names if name is not None]
    if levels and not set(levels) & set(frame.columns):
        frame = frame.reset_index(levels)
    frame = frame.rename(columns=str)
    check_header("the DataFrame", tuple(frame.columns))
    columns = {}
    for name in frame.columns:
        try:
            columns[name] = pa.Array.from_pandas(frame[name])
        except pa.ArrowException:
            texts = frame[name].map(str).where(frame[name].notna(), None)
            columns[name] = pa.array(texts, type=pa.string())
    return pa.table(columns)
