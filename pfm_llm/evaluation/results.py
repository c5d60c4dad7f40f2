"""Measured numbers and the file that keeps them, ``results.json``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.files import read_json, write_json
from pfm_llm.protocol.types import Mode

FULL, SAMPLED = "full", "sampled"
"""The candidates of a ranking: the whole catalogue, or a target and sampled negatives."""

SHARED_WITH = "shared_"
"""The prefix of a row's mode where the shared part scores with one piece of the private part."""

AUC, AUC_LABEL = "auc", "Like AUC"


@dataclass(frozen=True)
class ResultRow:
    """One measured number and the conditions of its measurement.

    Attributes:
        method: One of `methods.Method`, or a baseline such as ``popularity``.
        mode: A value of `types.Mode`, ``none`` for a baseline; or `SHARED_WITH` and a piece.
        task: The prediction task, such as ``next_item``.
        protocol: The rule for held-out interactions, such as ``leave_last_out``.
        budget: The budget of the method, in words or figures.
        split: ``validation`` or ``test``.
        candidates: `FULL` (the whole catalogue) or ``sampled<n>`` (n sampled negatives).
        metric: ``ndcg``, ``hit_rate``, ``mrr``, ``auc``, or a measure of `personality`.
        k: The cut-off of the ranked list; 0 where there is none.
        value: Mean over users.
        ci_low: Lower end of the bootstrap interval over users.
        ci_high: Upper end of this interval.
        num_users: How many users the mean is over.
        seed: The experiment's seed.
        regime: The division of work between clients and server: ``fedsgd``, ``fedavg`` or ``""``.

    Raises:
        DataError: The mode is unknown or a number is not finite.
    """

    method: str
    mode: str
    task: str
    protocol: str
    budget: str
    split: str
    candidates: str
    metric: str
    k: int
    value: float
    ci_low: float
    ci_high: float
    num_users: int
    seed: int
    regime: str = ""

    def __post_init__(self) -> None:
        what = f"result {self.method}/{self.mode} {self.metric}@{self.k}"
        if self.mode not in list(Mode) and not self.mode.startswith(SHARED_WITH):
            raise DataError(f"{what}: unknown mode; valid: {', '.join(Mode)}, {SHARED_WITH}PIECE")
        if not all(map(math.isfinite, (self.value, self.ci_low, self.ci_high))):
            raise DataError(
                f"{what}: {self.value} [{self.ci_low}, {self.ci_high}] over {self.num_users} "
                "users is not finite; evaluate at least one user"
            )

    @property
    def label(self) -> str:
        """A dotted name of the number, without protocol, budget, regime and seed."""
        metric = self.metric + (f"@{self.k}" if self.k else "")
        conditions = (self.split, self.task, self.candidates, self.method, self.mode)
        return ".".join([*conditions, metric])


def judged_mode(has_private: bool) -> Mode:
    """The mode whose figures a run is judged by: with the private part, if the run has one."""
    return Mode.SHARED_PRIVATE if has_private else Mode.SHARED_ONLY


def write_results(path: Path, rows: Sequence[ResultRow], extra: Mapping[str, Any]) -> None:
    """Write ``results.json``.

    Args:
        path: The file.
        rows: The measured numbers.
        extra: Further top-level keys in plain JSON types: ``config``, ``environment``, ``costs``.

    Raises:
        DataError: ``extra`` holds ``rows``, or a value that JSON cannot hold, such as NaN.
        StorageError: The file cannot be written.
    """
    if "rows" in extra:
        raise DataError(f"{path}: 'rows' is taken by the results; name the extra key otherwise")
    try:
        write_json(path, {"rows": [dataclasses.asdict(row) for row in rows], **extra})
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}: rows, config, environment or costs cannot be written as JSON: {error}; give "
            "plain values without NaN"
        ) from error


def read_results(path: Path) -> tuple[list[ResultRow], dict[str, Any]]:
    """Read ``results.json`` back: its rows, and its other top-level keys.

    Raises:
        DataError: There is no such file.
        CorruptFileError: The file does not have the form that `write_results` writes.
    """
    if not path.is_file():
        raise DataError(f"no results at {path}; run `pfm evaluate` first")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise CorruptFileError(f"{path} holds no list of rows; run `pfm evaluate` again")
    rows = [_parse_row(row, f"{path}, row {n}") for n, row in enumerate(content.pop("rows"), 1)]
    return rows, content


def _parse_row(row: Any, where: str) -> ResultRow:
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ResultRow)}
    if isinstance(row, dict):
        row = {"regime": "", **row}  # files from before there were regimes
    if not isinstance(row, dict) or row.keys() != fields.keys():
        raise CorruptFileError(
            f"{where}: expected the keys {', '.join(fields)}; run `pfm evaluate` again"
        )
    for name, kind in fields.items():
        valid = (int, float) if kind is float else kind
        if isinstance(row[name], bool) or not isinstance(row[name], valid):
            raise CorruptFileError(
                f"{where}: {name} is {row[name]!r}, not {kind.__name__}; run `pfm evaluate` again"
            )
    try:
        return ResultRow(**row)
    except DataError as error:
        raise CorruptFileError(f"{where}: {error}") from error
