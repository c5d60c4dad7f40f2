"""Arrow tables as tables of text: Parquet, whole or in parts, and `datasets`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pfm_llm.base.errors import DataError
from pfm_llm.data.tables import LazyColumns, Table, check_header


def read_parquet(path: Path, files: Sequence[Path]) -> Table:
    """Read Parquet files, one after another, as one table.

    Args:
        path: Their name in messages.
        files: At least one, of one schema.

    Raises:
        DataError: A file is damaged, or its columns do not fit those of the others.
    """
    try:
        check_header(str(path), tuple(pq.read_schema(files[0]).names))
        content = ds.dataset([str(file) for file in files], format="parquet")
        num_rows = content.count_rows()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error

    def load(name: str) -> Any:
        try:
            return content.to_table(columns=[name]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from error

    return from_schema(str(path), content.schema, num_rows, load)


def from_schema(name: str, schema: pa.Schema, num_rows: int, load: Callable[[str], Any]) -> Table:
    """A `Table` of Arrow columns that are read when they are asked for.

    Nulls and NaN become ``""``, and lists are joined by commas. Columns of nested values or bytes
    are passed over. Bytes can be asked for by name: they are UTF-8, or else written in hex.

    Args:
        name: For messages.
        schema: The columns.
        num_rows: Their length.
        load: Reads a column as a chunked array.

    Raises:
        DataError: Two columns have one name; or, later, a nested column is asked for.
    """
    header = tuple(schema.names)
    check_header(name, header)
    readable = [field.name for field in schema if _can_be_text(field.type)]

    def column(asked: str) -> list[str]:
        kind = schema.field(asked).type
        if asked not in readable and not _is_bytes(kind):
            raise DataError(
                f"{name}: column {asked!r} of type {kind} cannot be read as text; name "
                "another column in data.columns, or write its texts as a column of their own"
            )
        return _as_text(load(asked))

    return Table(
        name=name,
        header=header,
        columns=LazyColumns(readable, column),
        positions=range(1, num_rows + 1),
        unit="row",
        inferred=("columns and types as the file names them",),
    )


def from_arrow(name: str, content: pa.Table) -> Table:
    """`from_schema` of a table in memory."""
    return from_schema(name, content.schema, content.num_rows, content.column)


def _is_bytes(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _can_be_text(kind: Any) -> bool:
    """Whether the values of a type have a form as text; bytes, which may be anything, have none."""
    inner = kind.value_type if _is_list(kind) else kind
    if _is_bytes(inner) or (_is_list(kind) and pa.types.is_nested(inner)):
        return False
    try:
        _as_text(pa.chunked_array([], type=kind))
    except pa.ArrowException:
        return False
    return True


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _as_text(column: Any) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_bytes(column.type):
        return _decoded(column.to_pylist())
    if _is_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), ", ")
    elif pa.types.is_floating(column.type):
        if pa.types.is_float16(column.type):  # it has no text of its own
            column = column.cast(pa.float32())
        column = pc.if_else(pc.is_nan(column), None, column)
        # Whole numbers with gaps are stored as floats: an id 1.0 is 1.
        if pc.all(pc.equal(pc.floor(column), column), min_count=0).as_py():
            column = column.cast(pa.int64(), safe=False)
    return [value.strip() if value else "" for value in column.cast(pa.string()).to_pylist()]


def _decoded(values: Sequence[bytes | None]) -> list[str]:
    try:
        texts = [(value or b"").decode().strip() for value in values]
        if all(text.isprintable() for text in texts):
            return texts
    except UnicodeDecodeError:
        pass
    return [(value or b"").hex() for value in values]
