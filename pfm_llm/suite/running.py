"""Runs the missing experiments of a suite one after another; it may be stopped at any moment.

For each run and seed, every grid value is trained and evaluated on validation. The best one is
evaluated on test and its result is written. The folders of the others are deleted. Each step writes
a file atomically, and a new start continues with the first step without a file. An interrupted
experiment continues from its last commit.
"""

import contextlib
import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    PfmError,
    TrainingError,
)
from pfm_llm.base.locks import locked
from pfm_llm.config.schema import ExperimentConfig, dump_config, read_yaml
from pfm_llm.evaluation.openings import OPENINGS_FILE
from pfm_llm.evaluation.results import ResultRow, read_results, write_results
from pfm_llm.runs.folders import CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE
from pfm_llm.suite import records
from pfm_llm.suite.pace import Pace
from pfm_llm.suite.plan import BESIDE, Plan, Point, SuiteRun
from pfm_llm.suite.records import Record
from pfm_llm.suite.scripts import call_script
from pfm_llm.suite.status import (
    COMPARED,
    State,
    changes,
    figures_hash,
    is_recorded,
    read_tree,
    status_of,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tools:
    """The functions that do the work of a suite.

    Attributes:
        train: Trains a config and evaluates it on the config's splits. Takes the config and
            whether to resume, returns the run's folder.
        evaluate: Takes a run's folder, the budget and the file that counts measurements of test,
            returns the rows of the final evaluation.
        script: Calls a baseline's script, as `call_script` does.
        compare: Compares two runs, as `adds.adds_rows` does; None: nothing is compared.
    """

    train: Callable[[ExperimentConfig, bool], Path]
    evaluate: Callable[[Path, str, Path], Sequence[ResultRow]]
    script: Callable[..., None] = call_script
    compare: Callable[..., Sequence[ResultRow]] | None = None

    @classmethod
    def real(cls) -> "Tools":
        """The functions of the library."""
        from pfm_llm.runs.experiment import run_experiment
        from pfm_llm.runs.study.run import study_run
        from pfm_llm.suite.adds import adds_rows

        def train(config: ExperimentConfig, resume: bool) -> Path:
            gc.collect()  # cycles hold the last model, and memory may not suffice for two
            return run_experiment(config, resume)

        return cls(train, study_run, compare=adds_rows)


def run_suite(
    plan: Plan,
    results: Path,
    tools: Tools,
    keep: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Run the runs of a plan that have no valid result.

    Args:
        plan: The plan.
        results: The folder of all results.
        tools: The functions that train and evaluate.
        keep: Whether to keep the folders of the values that were not chosen.
        clock: Monotonic time in seconds.

    Returns:
        The label of each failed run to its error message; all other runs have a result.

    Raises:
        LaunchError: Several processes were started.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError("a suite runs on one process; start it with --num_processes 1")
    left = [r for r in plan.runs if status_of(plan, r, results).state is not State.DONE]
    pace = Pace(plan.runs, left, clock)
    runner = _Runner(plan, results, tools, keep, pace)
    failures = {}
    for run in plan.runs:
        message = runner.settle(run)
        if message is not None:
            pace.gave_up(run)
            failures[run.label] = message
            _log.warning("%s failed: %s", run.label, message)
    return failures


class _Runner:
    """See `run_suite`."""

    def __init__(self, plan: Plan, results: Path, tools: Tools, keep: bool, pace: Pace) -> None:
        self._plan, self._results, self._tools = plan, results, tools
        self._keep, self._pace = keep, pace
        self._openings = results / OPENINGS_FILE

    def settle(self, run: SuiteRun) -> str | None:
        """Complete a run; returns the error message if it failed."""
        path = self._plan.result(run, self._results)
        try:
            busy = f"{run.label} is being run by another process"
            with locked(run.folder / f"{run.label}.lock", busy):
                try:
                    self._run(run)
                except PfmError as error:
                    records.write_failure(self._plan, run, path, str(error))
                    return str(error)
        except PfmError as error:  # another process holds it, or the failure cannot be written
            return str(error)
        return None

    def _run(self, run: SuiteRun) -> None:
        status = status_of(self._plan, run, self._results)
        if status.state is State.STALE:
            _log.info("%s is run anew: %s", run.label, status.detail)
        if status.state is State.DONE:
            self._tidy(run, self._chosen(run))
        elif run.script is not None:
            self._run_script(run)
        else:
            self._run_experiments(run)

    def _run_experiments(self, run: SuiteRun) -> None:
        found = [self._record(run, point) for point in run.points]
        try:
            choice = records.choose(run, found, self._plan.select)
        except TrainingError:
            self._tidy(run, None)
            raise
        chosen = run.points[choice.index]
        if not _is_begun(chosen):
            _log.info("%s: its folder is missing; it is trained again", chosen.config.name)
            with files.storage_errors(chosen.record):
                chosen.record.unlink()  # with it, a half-trained folder would count as trained
            self._train(run, chosen)
        # Settings of the evaluation may have changed since training.
        config = found[choice.index].settled(chosen.config)
        files.write_text(chosen.folder / CONFIG_FILE, dump_config(config))
        with self._pace.evaluating(run):
            rows = self._tools.evaluate(chosen.folder, self._plan.budget, self._openings)
        differences, others = self._compared(run, chosen)
        rows = [*rows, *differences]
        _, extra = read_results(chosen.folder / RESULTS_FILE)
        extra |= {COMPARED: others} if others else {}
        extra |= records.result_extra(self._plan, run, choice, found)
        path = self._plan.result(run, self._results)
        write_results(path, records.merged(rows, found[choice.index].rows), extra)
        self._tidy(run, chosen)

    def _compared(
        self, run: SuiteRun, chosen: Point
    ) -> tuple[list[ResultRow], dict[str, dict[str, str]]]:
        """The differences to the runs that it is compared with, and what these were."""
        compare, budget = self._tools.compare, self._plan.budget
        rows: list[ResultRow] = []
        others: dict[str, dict[str, str]] = {}
        if compare is None:
            return rows, others
        if run.against is not None:
            whole, others["against"] = self._compared_with(run, run.against)
            rows += compare(whole.folder, chosen.folder, chosen.config, budget)
        if run.beside is not None:
            other, others["beside"] = self._compared_with(run, run.beside)
            rows += compare(chosen.folder, other.folder, chosen.config, budget, BESIDE)
        return rows, others

    def _compared_with(self, run: SuiteRun, name: str) -> tuple[Point, dict[str, str]]:
        """The experiment of the same seed whose figures an earlier run's result holds.

        Returns:
            The experiment; and what `status_of` compares later with the result that is then there.
        """
        label = f"{name}-s{run.seed}"
        earlier = next((one for one in self._plan.runs if one.label == label), None)
        point = None if earlier is None else self._chosen(earlier)
        if earlier is None or point is None:
            raise DataError(f"{run.label} is compared with {label}, which has no result; run that")
        stored = read_tree(self._plan.result(earlier, self._results)) or {}
        return point, {"run": label, "figures": figures_hash(stored)}

    def _chosen(self, run: SuiteRun) -> Point | None:
        """The experiment whose figures a run's result holds; None without such a result."""
        stored = read_tree(self._plan.result(run, self._results))
        if not stored or stored.get("failed"):
            return None
        value = stored["grid"]["chosen"]
        return next(point for point in run.points if point.value == value)

    def _record(self, run: SuiteRun, point: Point) -> Record:
        """The record of an experiment, which is trained now if there is none."""
        if is_recorded(point):
            return records.read_record(point)
        return self._train(run, point)

    def _train(self, run: SuiteRun, point: Point) -> Record:
        name = point.config.name
        stored = read_tree(point.record)
        if stored is not None and (differing := changes(stored, point.config)):
            _log.info("%s is trained anew: %s", name, "; ".join(differing))
        resume = _is_begun(point)
        if not resume:
            _discard(point)
        _log.info("%s %s", "going on with" if resume else "training", name)
        started = self._pace.now()
        try:
            folder = self._tools.train(point.config, resume)
        except TrainingError as error:
            record = Record((), failed=str(error), num_clients=_num_clients(point))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or delete {point.folder} to train it anew") from error
        else:
            rows, _ = read_results(folder / RESULTS_FILE)
            seconds = None if resume else self._pace.now() - started
            record = Record(tuple(rows), None, seconds, _num_clients(point))
        records.write_record(point, record)
        self._log_trained(run, point, record)
        return record

    def _log_trained(self, run: SuiteRun, point: Point, record: Record) -> None:
        what = f"training failed: {record.failed}"
        if not record.failed:
            figure = records.figure_of(run, point, record, self._plan.select)
            what = f"{self._plan.select.figure} {figure:.4f} on validation"
        _log.info("%s", self._pace.trained(point, record, what))

    def _run_script(self, run: SuiteRun) -> None:
        (point,) = run.points
        assert run.script is not None
        config = point.folder.with_name(f"{point.config.name}.{CONFIG_FILE}")
        output = point.folder.with_name(f"{point.config.name}.output.json")
        files.write_text(config, dump_config(point.config))
        script, *further = run.script
        _log.info("calling %s for %s", " ".join(run.script), run.label)
        started = self._pace.now()
        self._tools.script(
            Path(script),
            further,
            config=config,
            seed=run.seed,
            output=output,
            openings=self._openings,
        )
        rows, extra = read_results(output)
        record = Record(tuple(rows), None, self._pace.now() - started)
        choice = records.choose(run, [record], self._plan.select)
        extra |= records.result_extra(self._plan, run, choice, [record])
        write_results(self._plan.result(run, self._results), rows, extra)
        self._log_trained(run, point, record)

    def _tidy(self, run: SuiteRun, winner: Point | None) -> None:
        """Delete the folders of all points but the winner."""
        if self._keep or run.script is not None:
            return
        for point in run.points:
            if point != winner:
                _discard(point)


def _is_begun(point: Point) -> bool:
    """Whether the folder holds a run with the point's settings, which can be resumed."""
    try:
        tree = read_yaml(point.folder / CONFIG_FILE)
    except ConfigError:  # the file is missing or truncated
        return False
    # The tree as written: a parsed config would have today's defaults for settings that it lacks.
    return not changes({"config": tree, "num_clients": _num_clients(point)}, point.config)


def _num_clients(point: Point) -> int | None:
    """Number of training clients of an experiment; None before its folder records it."""
    environment = read_tree(point.folder / ENVIRONMENT_FILE) or {}
    return environment.get("num_clients")


def _discard(point: Point) -> None:
    for folder in (point.folder, point.folder.with_name(f"{point.folder.name}.private")):
        with files.storage_errors(folder), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
