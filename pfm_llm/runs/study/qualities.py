"""How well each user of a run is served, kept so that runs can be compared over the same users.

The file is in the run's private folder: its order names the users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.evaluation.evaluator import Measured
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.measuring import quality_of

QUALITIES_FILE = "qualities.json"
_NAMES = ("log_rank", "ndcg")


@dataclass(frozen=True)
class Qualities:
    """The quality of each user on test, over the full catalogue.

    Attributes:
        users: Internal ids, ascending, int64 [U].
        of: Mode to the name of a quality to its values, float64 [U].
    """

    users: np.ndarray
    of: Mapping[Mode, Mapping[str, np.ndarray]]


def write_qualities(folder: Path, measured: Measured, k: int) -> None:
    """Keep the qualities of a measured run.

    Args:
        folder: The run's public folder.
        measured: Its ranks.
        k: Cut-off of NDCG.

    Raises:
        StorageError: The file cannot be written.
    """
    tree = {
        "users": np.unique(next(iter(measured.ranks.values())).users).tolist(),
        **{
            mode.value: {name: quality_of(measured, mode, name, k).tolist() for name in _NAMES}
            for mode in measured.ranks
        },
    }
    files.write_json(RunFolders.of(folder).private / QUALITIES_FILE, tree)


def read_qualities(folder: Path) -> Qualities:
    """Read what `write_qualities` kept.

    Raises:
        DataError: There is no such file.
        CorruptFileError: It is damaged.
    """
    path = RunFolders.of(folder).private / QUALITIES_FILE
    if not path.exists():
        raise DataError(
            f"{path} is missing, so {folder.name} cannot be compared: measure it again (a suite "
            "does where its result file was deleted)"
        )
    tree = files.read_json(path)
    try:
        users = np.asarray(tree["users"], np.int64)
        of = {
            Mode(mode): {name: np.asarray(own[name], np.float64) for name in _NAMES}
            for mode, own in tree.items()
            if mode != "users"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); measure the run again") from error
    return Qualities(users, of)
