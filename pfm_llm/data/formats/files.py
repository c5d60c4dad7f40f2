"""One table from one file, or from a folder of parts; the content tells the format."""

from collections.abc import Collection
from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ReadingConfig
from pfm_llm.data.formats.amazon import without_review_titles
from pfm_llm.data.formats.arrow_table import read_parquet
from pfm_llm.data.formats.content import PARQUET, decode, read_content
from pfm_llm.data.formats.delimited import INFERRED, read_unknown
from pfm_llm.data.formats.json_lines import is_json, read_json_lines
from pfm_llm.data.formats.parts import PARQUET as PARQUET_KIND
from pfm_llm.data.formats.parts import kind_of, parts_of, read_parts
from pfm_llm.data.tables import Table

SUFFIXES = (
    *(".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json", ".gz", ".dat", ".inter", ".item"),
)
"""Suffixes of tables: such a name is a path, and no id of a data set."""


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a table; empty if ``path`` is neither a file nor a folder of parts.

    Raises:
        DataError: A folder holds tables of several kinds.
    """
    return (path,) if path.is_file() else parts_of(path)


def read_table(path: Path, names: Collection[str] = (), reading: ReadingConfig = INFERRED) -> Table:
    """Read a table of text.

    A CSV, TSV or other file of separated fields (``,``, ``;``, tab, ``|`` or ``::``) may have any
    of the usual encodings and may lack a header. JSON has an object on each line. All may be
    gzipped. Each may be a folder of parts, and so may Parquet.

    Args:
        path: The file or folder.
        names: Column names that the config gives: a line that holds one is a header.
        reading: What is not to be inferred.

    Raises:
        DataError: The file is missing, empty, of another kind or cannot be decoded; parts do not
            fit together; or ``reading`` says what does not concern the kind.
    """
    if path.is_dir() and (parts := parts_of(path)):
        if kind_of(parts[0]) != PARQUET_KIND:
            return read_parts(path, parts, names, reading, _read_file)
        _check_unread(path, PARQUET_KIND, reading, "separator", "encoding", "header")
        return read_parquet(path, parts)
    return _read_file(path, names, reading)


def _read_file(path: Path, names: Collection[str], reading: ReadingConfig) -> Table:
    content = read_content(path)
    if content.startswith(PARQUET) or kind_of(path) == PARQUET_KIND:
        _check_unread(path, PARQUET_KIND, reading, "separator", "encoding", "header")
        return read_parquet(path, [path])
    text, encoding = decode(path, content, reading.encoding)
    if reading.separator is None and is_json(text):
        _check_unread(path, "JSON", reading, "header")
        return without_review_titles(read_json_lines(path, text, encoding))
    return without_review_titles(read_unknown(path, (text, encoding), names, reading))


def _check_unread(path: Path, kind: str, reading: ReadingConfig, *unread: str) -> None:
    if given := [name for name in unread if name in reading.given]:
        raise DataError(
            f"{path} is {kind}, which {' and '.join(given)} in data.reading have no meaning for; "
            "leave them out"
        )
