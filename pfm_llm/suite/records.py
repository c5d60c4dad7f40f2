"""The files of a suite: a record of each experiment, and a result of each run.

A record holds the figures of an experiment on validation. It is kept when the experiment's folder
is deleted. Tables and reports are made from the results. Both files have the format of
`results.write_results`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import DataError, TrainingError
from pfm_llm.config.schema import ExperimentConfig, training_hash
from pfm_llm.config.settle import settle
from pfm_llm.evaluation.results import FULL, ResultRow, judged_mode, read_results, write_results
from pfm_llm.protocol.types import Mode
from pfm_llm.suite.plan import POPULARITY, VALIDATION, Plan, Point, SelectConfig, SuiteRun


@dataclass(frozen=True)
class Record:
    """The record of one experiment.

    Attributes:
        rows: Its figures on validation; empty if it failed.
        failed: The reason why training failed; None if it did not fail.
        seconds: Its duration without the final evaluation; None if it was resumed.
        num_clients: Number of training clients; None if unknown, as for a script.
    """

    rows: tuple[ResultRow, ...]
    failed: str | None = None
    seconds: float | None = None
    num_clients: int | None = None

    def settled(self, config: ExperimentConfig) -> ExperimentConfig:
        """The experiment's config with values that follow from the number of clients."""
        return config if self.num_clients is None else settle(config, self.num_clients)


def write_record(point: Point, record: Record) -> None:
    """Write the record of an experiment, with its settings.

    Raises:
        StorageError: It cannot be written.
    """
    extra = {
        **_settings(point.config, record),
        "value": point.value,
        "failed": record.failed,
        "seconds": record.seconds,
    }
    write_results(point.record, record.rows, extra)


def read_record(point: Point) -> Record:
    """Read the record of an experiment; see `status.is_recorded`.

    Raises:
        DataError: The record does not exist.
        CorruptFileError: The file does not have the format of `write_record`.
    """
    rows, extra = read_results(point.record)
    kept = (extra.get(name) for name in ("failed", "seconds", "num_clients"))
    return Record(tuple(rows), *kept)


@dataclass(frozen=True)
class Choice:
    """The experiment of a run with the best figure.

    Attributes:
        index: The index of the experiment in the run's points.
        figures: The figure of each point; None if training failed.
        popularity: The same figure of popularity; None if it was not measured.
    """

    index: int
    figures: tuple[float | None, ...]
    popularity: float | None

    @property
    def did_not_learn(self) -> bool | None:
        """Whether its figure is at most that of popularity; None if one of them is unknown."""
        best = self.figures[self.index]
        if best is None or self.popularity is None:
            return None
        return best <= self.popularity


def choose(run: SuiteRun, records: Sequence[Record], select: SelectConfig) -> Choice:
    """The best experiment of a run on validation; among equals, the first.

    Args:
        run: The run.
        records: The records of its points, in their order.
        select: The figure that chooses.

    Raises:
        TrainingError: Training failed with every value.
        DataError: A record lacks the figure.
    """
    figures = tuple(
        None if record.failed else figure_of(run, point, record, select)
        for point, record in zip(run.points, records, strict=True)
    )
    learned = [index for index, figure in enumerate(figures) if figure is not None]
    if not learned:
        reasons = "; ".join(
            f"{point.value}: {record.failed}" if run.key else str(record.failed)
            for point, record in zip(run.points, records, strict=True)
        )
        raise TrainingError(f"{run.label}: training failed with every value: {reasons}")
    best = max(learned, key=lambda index: (figures[index], -index))
    baselines = _matching(records[best].rows, select, Mode.NONE)
    popularity = next((row.value for row in baselines if row.method == POPULARITY), None)
    return Choice(best, figures, popularity)


def figure_of(run: SuiteRun, point: Point, record: Record, select: SelectConfig) -> float:
    """The figure of an experiment on validation; of a script, that of its best method.

    Raises:
        DataError: The record lacks the figure.
    """
    expected = (
        f"expected one row with metric {select.metric}, k {select.k}, task {select.task} on the "
        "full catalogue of validation; correct `select` or what is evaluated"
    )
    if run.script is not None:
        rows = _matching(record.rows, select, Mode.NONE)
        found = [row.value for row in rows if row.method != POPULARITY]
        if not found:
            raise DataError(f"{run.label}: {expected}")
        return max(found)
    mode = judged_mode(point.config.adapters.private.enabled)
    found = [row.value for row in _matching(record.rows, select, mode)]
    if len(found) != 1:
        raise DataError(
            f"{point.record}: {len(found)} rows in mode {mode}; {expected}, and delete the file to "
            "evaluate again"
        )
    return found[0]


def result_extra(
    plan: Plan, run: SuiteRun, choice: Choice, records: Sequence[Record]
) -> dict[str, Any]:
    """The entries of a result file besides rows, environment and costs."""
    extra = _extra(plan, run, choice, records)
    return {**extra, "popularity": choice.popularity, "did_not_learn": choice.did_not_learn}


def write_failure(plan: Plan, run: SuiteRun, path: Path, message: str) -> None:
    """Write the result file of a failed run: no rows, and the reason of the failure.

    Raises:
        StorageError: It cannot be written.
    """
    count = len(run.points)
    extra = _extra(plan, run, Choice(0, (None,) * count, None), [Record(())] * count)
    extra["grid"]["chosen"] = None
    write_results(path, [], {**extra, "failed": message})


def merged(first: Iterable[ResultRow], second: Iterable[ResultRow]) -> list[ResultRow]:
    """All rows of the first, and the rows of the second whose figure the first lacks."""
    rows = {_identity(row): row for row in first}
    for row in second:
        rows.setdefault(_identity(row), row)
    return list(rows.values())


def _identity(row: ResultRow) -> tuple[object, ...]:
    numbers = {"value", "ci_low", "ci_high", "num_users", "budget"}
    return tuple(value for name, value in vars(row).items() if name not in numbers)


def _extra(plan: Plan, run: SuiteRun, choice: Choice, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "suite": plan.suite,
        "budget": plan.budget,
        "run": run.name,
        "seed": run.seed,
        "position": run.position,
        "script": None if run.script is None else list(run.script),
        "select": plan.select.model_dump(),
        **_settings(run.points[choice.index].config, records[choice.index]),
        "grid": {
            "key": run.key,
            "chosen": run.points[choice.index].value,
            "values": [
                {
                    "value": point.value,
                    "figure": figure,
                    "failed": record.failed,
                    "training_hash": training_hash(record.settled(point.config)),
                }
                for point, figure, record in zip(run.points, choice.figures, records, strict=True)
            ],
        },
    }


def _settings(config: ExperimentConfig, record: Record) -> dict[str, Any]:
    settled = record.settled(config)
    return {
        "training_hash": training_hash(settled),
        "config": settled.model_dump(mode="json"),
        "num_clients": record.num_clients,
    }


def _matching(rows: Iterable[ResultRow], select: SelectConfig, mode: Mode) -> list[ResultRow]:
    return [
        row
        for row in rows
        if (row.split, row.candidates, row.metric, row.k, row.task, row.mode)
        == (VALIDATION, FULL, select.metric, select.k, select.task, mode)
    ]
