"""The plan of a suite: one config for every run, seed and grid value.

Later settings win. The order is: the base config, ``set`` of the suite, of the budget and of the
run, ``set_with`` of the run for this budget, the grid's value. The settings that a run's ``method``
fixes win over the base, the suite and the budget, so that one base serves all methods. An unknown
key is an error that names the nearest valid key.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.cut_offs import RANK_LABELS, headline_k
from pfm_llm.config.methods import SPECS, Method
from pfm_llm.config.model import Settings
from pfm_llm.config.schema import ExperimentConfig, parse_config, read_yaml
from pfm_llm.config.settings import with_setting
from pfm_llm.config.text import set_setting, validated

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

POPULARITY = "popularity"
VALIDATION, TEST = "validation", "test"
_OWN_KEYS = ("name", "seed")

ADDS, BESIDE = "adds", "beside"
"""Prefixes of the rows that compare two runs: with `RunConfig.against`, and with ``beside``."""


class SelectConfig(Settings):
    """The figure on validation that chooses a grid value, over the full catalogue."""

    metric: str = "ndcg"
    k: int | None = Field(
        None,
        ge=0,
        description="cut-off of the ranked list, 0 for metrics without one; None: 10 where the "
        "runs measure it, otherwise their first cut-off",
    )
    task: str = "next_item"

    @property
    def figure(self) -> str:
        """Name of the figure that chooses, such as ``ndcg@10``."""
        return self.metric + (f"@{self.k}" if self.k else "")


class BudgetConfig(Settings):
    """The size of the experiments, and the runs."""

    set: dict[str, Any] = Field({})
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    runs: tuple[str, ...] | None = Field(None, description="names of runs; None: all")
    grids: bool = Field(True, description="false: one experiment per run, with `set`")


class GridConfig(Settings):
    """The values of one setting; validation chooses one of them."""

    key: str = Field(description="dotted key of the config")
    values: tuple[Scalar, ...] = Field(min_length=1)


class RunConfig(Settings):
    """A run, one line of the table: settings, or a baseline's script."""

    name: Name
    set: dict[str, Any] = Field({})
    set_with: dict[str, dict[str, Any]] = Field({}, description="budget to further settings")
    grid: str | None = Field(None, description="name of a grid; None: one experiment")
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="for every budget; None: the budget's seeds"
    )
    script: str | None = Field(
        None,
        description="called with --config FILE --seed N --output FILE --openings FILE instead "
        "of training",
    )
    arguments: tuple[str, ...] = Field((), description="further arguments of the script")
    against: str | None = Field(
        None,
        description="an earlier run, which has what this one does without: the paired differences "
        "tell what that adds",
    )
    beside: str | None = Field(
        None,
        description="an earlier run, which this one could replace: the paired differences tell "
        "what is gained or lost",
    )


class SuiteConfig(Settings):
    """The whole suite file."""

    name: Name
    base: str = Field(description="a config, relative to the suite's file")
    set: dict[str, Any] = Field({})
    select: SelectConfig = SelectConfig()
    budgets: dict[Name, BudgetConfig] = Field(min_length=1)
    grids: dict[str, GridConfig] = Field({})
    runs: tuple[RunConfig, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Point:
    """One experiment.

    Attributes:
        value: The grid value; None without a grid.
        config: Its config; the name is that of the run folder.
    """

    value: Scalar | None
    config: ExperimentConfig

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output.dir) / self.config.name

    @property
    def record(self) -> Path:
        """The file of its validation figures, which is kept when the run's folder is deleted."""
        return self.folder.with_name(f"{self.folder.name}.json")


@dataclass(frozen=True)
class SuiteRun:
    """A run with one seed: its grid of experiments, of which validation chooses one.

    Attributes:
        name: The run's name in the suite.
        seed: The seed of all its experiments.
        position: The run's place in the suite, from 0.
        key: The grid's dotted key; None without a grid.
        points: The experiments, in the grid's order.
        script: A baseline's script and its further arguments; None for an experiment.
        against: Name of the earlier run that has what this one does without; None: no such run.
        beside: Name of the earlier run that this one could replace; None: no such run.
    """

    name: str
    seed: int
    position: int
    key: str | None
    points: tuple[Point, ...]
    script: tuple[str, ...] | None
    against: str | None = None
    beside: str | None = None

    @property
    def label(self) -> str:
        """Name and seed: the result's file without its suffix."""
        return f"{self.name}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """The parent of its experiments' folders."""
        return self.points[0].folder.parent


@dataclass(frozen=True)
class Plan:
    """The runs of a suite with one budget.

    Attributes:
        suite: The suite's name.
        budget: The budget's name.
        select: The figure that chooses.
        runs: Each run with each seed, in the suite's order.
    """

    suite: str
    budget: str
    select: SelectConfig
    runs: tuple[SuiteRun, ...]

    def result(self, run: SuiteRun, results: Path) -> Path:
        """The file of a run's result; ``results`` is the folder of all results."""
        return results / self.suite / self.budget / f"{run.label}.json"


def load_suite(path: Path) -> SuiteConfig:
    """Read a suite's YAML.

    Raises:
        ConfigError: The file cannot be read, a key or value is wrong, or the name of a run, grid
            or budget is unknown.
    """
    suite = validated(read_yaml(path), SuiteConfig, str(path))
    names = [run.name for run in suite.runs]
    _refuse_twice(names, f"{path}: run")
    for run in suite.runs:
        if run.grid is not None:
            _look_up(run.grid, list(suite.grids), f"{path}, run {run.name}: grid")
        for budget in run.set_with:
            _look_up(budget, list(suite.budgets), f"{path}, run {run.name}: set_with")
            if "method" in run.set_with[budget]:
                raise ConfigError(f"{path}, run {run.name}: set_with: method belongs to set")
        for key, other in (("against", run.against), ("beside", run.beside)):
            if other is None:
                continue
            own, before = f"{path}, run {run.name}: {key}", names[: names.index(run.name)]
            _look_up(other, before, own)
            if run.script or suite.runs[names.index(other)].script:
                raise ConfigError(f"{own}: a script is no run to compare; compare experiments")
        if run.arguments and run.script is None:
            raise ConfigError(f"{path}, run {run.name}: arguments are for a script; set script")
        if run.grid is not None and run.script is not None:
            raise ConfigError(
                f"{path}, run {run.name}: a script takes no grid; it chooses on validation itself"
            )
    for budget, settings in suite.budgets.items():
        for name in settings.runs or ():
            _look_up(name, names, f"{path}, budget {budget}: run")
    return suite


def make_plan(path: Path, budget: str, only: Sequence[str] = ()) -> Plan:
    """The plan of a suite with one budget; every config is validated.

    Args:
        path: The suite's YAML.
        budget: One of its budgets.
        only: Names of the runs to plan; empty: all of the budget.

    Raises:
        ConfigError: As `load_suite`; or a setting is wrong, is reserved for the suite, or prevents
            the choice on validation.
    """
    suite = load_suite(path)
    _look_up(budget, list(suite.budgets), f"{path}: budget")
    settings = suite.budgets[budget]
    names = [run.name for run in suite.runs if settings.runs is None or run.name in settings.runs]
    for name in only:
        _look_up(name, names, f"{path}, budget {budget}: run")
    base = read_yaml(path.parent / suite.base)
    runs = tuple(
        _suite_run(_Source(path, suite, budget, base), position, seed)
        for position, run in enumerate(suite.runs)
        if run.name in (only or names)
        for seed in run.seeds or settings.seeds
    )
    points = [point.config.name for run in runs for point in run.points]
    _refuse_twice([*points, *(run.label for run in runs if run.key)], f"{path}: run folder")
    _check_compared(runs, f"{path}, budget {budget}")
    return Plan(suite.name, budget, _settled(suite.select, runs, path), runs)


def _check_compared(runs: Sequence[SuiteRun], origin: str) -> None:
    """Refuse to plan a run without the one that it is compared with."""
    labels = {run.label for run in runs}
    for run in runs:
        for other in filter(None, (run.against, run.beside)):
            if f"{other}-s{run.seed}" not in labels:
                raise ConfigError(
                    f"{origin}: run {run.label} is compared with {other}-s{run.seed}, which is not "
                    f"planned; add --only {other}, which is not trained again if it has a result, "
                    "or correct the budget's runs and seeds"
                )


@dataclass(frozen=True)
class _Source:
    """The parts that make a config."""

    path: Path
    suite: SuiteConfig
    budget: str
    base: Mapping[str, Any]


def _settled(select: SelectConfig, runs: Sequence[SuiteRun], path: Path) -> SelectConfig:
    """The figure that chooses, with its cut-off, which each run must measure."""
    if select.metric not in RANK_LABELS:
        return select.model_copy(update={"k": select.k or 0})
    measured = [point.config.evaluation.ks for run in runs for point in run.points]
    common = [k for k in measured[0] if all(k in ks for ks in measured)]
    k = headline_k(common) if select.k is None else select.k
    if k not in common:
        raise ConfigError(
            f"{path}: select.k is {k}, and not every run measures it; the cut-offs of all runs are "
            f"{', '.join(map(str, common)) or 'none'}: correct select.k or evaluation.ks"
        )
    return select.model_copy(update={"k": k})


def _suite_run(source: _Source, position: int, seed: int) -> SuiteRun:
    run = source.suite.runs[position]
    takes_grids = source.suite.budgets[source.budget].grids
    grid = source.suite.grids[run.grid] if run.grid is not None and takes_grids else None
    label = f"{run.name}-s{seed}"
    points = []
    for value in (None,) if grid is None else grid.values:
        # A grid value becomes a part of the folder's name.
        name = label if grid is None else f"{label}-{re.sub(r'[^A-Za-z0-9._-]', '_', str(value))}"
        own = {} if grid is None else {grid.key: value}
        points.append(Point(value, _config(source, run, name, {"seed": seed, **own})))
    key = None if grid is None else grid.key
    script = None if run.script is None else (run.script, *run.arguments)
    return SuiteRun(run.name, seed, position, key, tuple(points), script, run.against, run.beside)


def _config(source: _Source, run: RunConfig, name: str, own: Mapping[str, Any]) -> ExperimentConfig:
    origin = f"{source.path}, run {run.name}"
    suite, budget = source.suite, source.suite.budgets[source.budget]
    above, of_run = [suite.set, budget.set], [run.set, run.set_with.get(source.budget, {})]
    for settings in (*above, *of_run):
        _refuse_own(settings, origin)
    of_method = [SPECS[method].settings for method in Method if method == run.set.get("method")]
    # Only the chosen value is evaluated on test, later. A script evaluates both splits at once.
    splits = [VALIDATION, TEST] if run.script else [VALIDATION]
    last = {**own, "name": name, "evaluation.splits": splits}
    tree = copy.deepcopy(dict(source.base))
    for level in (*above, *of_method, *of_run, last):
        for key, value in level.items():
            set_setting(tree, key, copy.deepcopy(value))
    config = parse_config(tree, origin)
    folder = Path(config.output.dir) / f"{suite.name}-{source.budget}"
    config = with_setting(config, "output.dir", str(folder))
    if config.push_to_hub is not None:
        raise ConfigError(f"{origin}: push_to_hub: a suite publishes nothing; remove it")
    if run.script is None and POPULARITY not in config.evaluation.baselines:
        raise ConfigError(
            f"{origin}: evaluation.baselines lacks {POPULARITY}, which shows whether a run "
            "learned; add it"
        )
    return config


def _refuse_own(settings: Mapping[str, Any], origin: str) -> None:
    for key, value in settings.items():
        if key in _OWN_KEYS:
            raise ConfigError(f"{origin}: {key} is set by the suite; remove it")
        if key == "evaluation.splits" and value != [VALIDATION]:
            raise ConfigError(
                f"{origin}: evaluation.splits: a suite chooses on [{VALIDATION}] and evaluates "
                "only the chosen run on test; remove it"
            )


def _look_up(name: str, valid: Sequence[str], what: str) -> None:
    if name not in valid:
        raise ConfigError(f"{what} {name!r} is unknown; there is {', '.join(valid) or 'none'}")


def _refuse_twice(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{what} {name!r} is not unique; rename one of the two")
