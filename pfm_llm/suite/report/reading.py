"""Reading of a suite's results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.files import read_json
from pfm_llm.evaluation.results import FULL, ResultRow, judged_mode, read_results
from pfm_llm.protocol.types import Mode
from pfm_llm.suite.plan import TEST


@dataclass(frozen=True)
class SuiteResult:
    """The result of one run with one seed.

    Attributes:
        run: The run's name.
        seed: Its seed.
        position: The run's place in the suite.
        mode: The mode of its headline figures.
        rows: All measured figures, including the baselines.
        extra: The other entries of its file: config, grid, costs, environment.
    """

    run: str
    seed: int
    position: int
    mode: Mode
    rows: tuple[ResultRow, ...]
    extra: Mapping[str, Any]

    @property
    def failed(self) -> str | None:
        """The reason why the run failed; None if it did not."""
        return self.extra.get("failed")

    @property
    def own_rows(self) -> list[ResultRow]:
        """The full-catalogue test rows of its own method, without baselines."""
        return [row for row in self.test_rows if row.mode != Mode.NONE]

    @property
    def test_rows(self) -> list[ResultRow]:
        """All full-catalogue test rows."""
        return [row for row in self.rows if (row.split, row.candidates) == (TEST, FULL)]


def read_suite(folder: Path) -> list[SuiteResult]:
    """All results of a suite with one budget, in the suite's order, seeds ascending.

    Args:
        folder: ``results/<suite>/<budget>``.

    Raises:
        DataError: The folder holds no result.
        CorruptFileError: A file does not have the format of the suite's results.
    """
    results = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise DataError(f"no results in {folder}; run `pfm suite` first")
    return sorted(results, key=lambda result: (result.position, result.run, result.seed))


def suite_folders(results: Path) -> list[Path]:
    """The folders below ``results`` that hold a suite's results, by name.

    Raises:
        CorruptFileError: A file two folders below ``results`` is not JSON.
    """
    trees = ((path.parent, read_json(path)) for path in results.glob("*/*/*.json"))
    return sorted({parent for parent, tree in trees if isinstance(tree, dict) and "suite" in tree})


def by_run(results: Sequence[SuiteResult]) -> dict[str, list[SuiteResult]]:
    """Name of a run to its results that did not fail, one for each seed."""
    runs: dict[str, list[SuiteResult]] = {}
    for result in results:
        if result.failed is None:
            runs.setdefault(result.run, []).append(result)
    return runs


def _read(path: Path) -> SuiteResult:
    rows, extra = read_results(path)
    try:
        has_private = extra["config"]["adapters"]["private"]["enabled"]
        return SuiteResult(
            run=str(extra["run"]),
            seed=int(extra["seed"]),
            position=int(extra["position"]),
            mode=judged_mode(has_private),
            rows=tuple(rows),
            extra=extra,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is not a result of a suite ({error}); delete it and run `pfm suite`"
        ) from error
