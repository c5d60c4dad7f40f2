"""RecBole's atomic files: ``NAME.inter`` and, beside it, ``NAME.item`` and ``NAME.user``."""

from pathlib import Path

from pfm_llm.base.errors import DataError
from pfm_llm.data.formats.files import read_table
from pfm_llm.data.formats.format import Format
from pfm_llm.data.tables import SourceTables

_INTERACTIONS = ".inter"


def recbole_files(path: Path) -> tuple[Path, ...]:
    """``NAME.inter`` and the files beside it that are there; empty if there is no such file.

    Args:
        path: The file ``NAME.inter``, or the folder that holds it.

    Raises:
        DataError: The folder holds several data sets.
    """
    if path.is_file():
        found = [path] if path.suffix == _INTERACTIONS else []
    else:
        found = sorted(path.glob(f"*{_INTERACTIONS}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{path} holds several data sets: {names}; name one of the files")
    beside = (found[0].with_suffix(suffix) for suffix in (".item", ".user")) if found else ()
    return (*found, *(file for file in beside if file.is_file()))


def read_recbole(path: Path) -> SourceTables:
    """Read atomic files. The types in their headers (``user_id:token``) are no part of the names.

    Raises:
        DataError: A file cannot be read.
    """
    tables = {file.suffix: read_table(file) for file in recbole_files(path)}
    return SourceTables(tables[_INTERACTIONS], tables.get(".item"), tables.get(".user"))


FORMAT = Format("RecBole", recbole_files, read_recbole)
