"""A kind of source that is made of several files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.config.data import ColumnsConfig
from pfm_llm.data.tables import SourceTables


@dataclass(frozen=True)
class Format:
    """How a source of several files is recognised and read.

    Attributes:
        name: In words.
        find: The files of a path on which the result depends; empty if it is of another format.
            Raises DataError if some of them are missing.
        read: Reads the tables of a path.
        columns: The columns of the tables; None: those of the config.
    """

    name: str
    find: Callable[[Path], tuple[Path, ...]]
    read: Callable[[Path], SourceTables]
    columns: ColumnsConfig | None = None
