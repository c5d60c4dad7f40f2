"""A suite whose experiments take no time: training that writes what it would have found."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pfm_llm.config.schema import ExperimentConfig, dump_config
from pfm_llm.config.settle import settle
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.suite.plan import Plan, make_plan
from pfm_llm.suite.running import Tools, run_suite

BASE: dict[str, Any] = {
    "name": "base",
    "data": {"source": "interactions.csv"},
    "federation": {"num_rounds": 3},
}
GRID = {"key": "federation.server.lr_lora", "values": [0.1, 0.2, 0.3]}
POPULARITY = 0.05
NUM_CLIENTS = 40


def row(**changes: Any) -> ResultRow:
    """A row, on validation unless told otherwise."""
    values: dict[str, Any] = {
        "method": "pfm",
        "mode": "shared_private",
        "task": "next_item",
        "protocol": "last_fraction",
        "budget": "small",
        "split": "validation",
        "candidates": "full",
        "metric": "ndcg",
        "k": 10,
        "value": 0.1,
        "num_users": 20,
        "seed": 0,
    } | changes
    values.setdefault("ci_low", values["value"] - 0.01)
    values.setdefault("ci_high", values["value"] + 0.01)
    return ResultRow(**values)


def popularity(**changes: Any) -> ResultRow:
    """Popularity's row."""
    return row(**{"method": "popularity", "mode": "none", "value": POPULARITY} | changes)


def figure_of(config: ExperimentConfig) -> float:
    """What the double's training reaches: best at a learning rate of 0.2."""
    return 0.1 - abs(config.federation.server.lr_lora - 0.2) / 10


@dataclass
class World:
    """A folder with a suite, and training that counts what it is asked for.

    Attributes:
        folder: Holds everything.
        figure: Config to validation figure.
        before: Called by name of a run when its training begins, its folder being there; and when
            it has ended, with ``<name> ended``. May raise.
        started: Name, and whether resumed, of each training.
        evaluated: Name and budget of each final evaluation.
        now: Seconds on the clock; a training takes 10, a final evaluation 4.
    """

    folder: Path
    figure: Callable[[ExperimentConfig], float] = figure_of
    before: Callable[[str], None] = lambda name: None
    started: list[tuple[str, bool]] = field(default_factory=list)
    evaluated: list[tuple[str, str]] = field(default_factory=list)
    now: float = 0.0

    @property
    def runs(self) -> Path:
        """The folder of the suite's runs."""
        return self.folder / "runs" / "films-small"

    @property
    def results(self) -> Path:
        """The folder of all results."""
        return self.folder / "results"

    @property
    def file(self) -> Path:
        """The suite's YAML."""
        return self.folder / "suites" / "films.yaml"

    def write(self, **changes: Any) -> "World":
        """Write base and suite."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "base.yaml").write_text(yaml.safe_dump(BASE))
        tree = {
            "name": "films",
            "base": "../base.yaml",
            "set": {"output.dir": str(self.folder / "runs")},
            "budgets": {"small": {}, "full": {"seeds": [0, 1]}},
            "grids": {"lr": GRID},
            "runs": [{"name": "a", "grid": "lr"}, {"name": "b"}],
        } | changes
        self.file.write_text(yaml.safe_dump(tree))
        return self

    def plan(self, budget: str = "small", only: Sequence[str] = ()) -> Plan:
        """The suite as it stands in the file."""
        return make_plan(self.file, budget, only)

    def run(self, only: Sequence[str] = (), keep: bool = False, **tools: Any) -> dict[str, str]:
        """Run the suite with the double's tools."""
        script = tools.get("script", self.script)
        used = Tools(self.train, self.evaluate, script, tools.get("compare"))
        return run_suite(self.plan(only=only), self.results, used, keep, lambda: self.now)

    def result(self, label: str) -> dict[str, Any]:
        """A result, as JSON."""
        content: dict[str, Any] = json.loads(self.result_file(label).read_text())
        return content

    def result_file(self, label: str) -> Path:
        """A result's file."""
        return self.results / "films" / "small" / f"{label}.json"

    def run_folders(self) -> list[str]:
        """Names of the run folders that are there, without private ones."""
        return sorted(p.name for p in self.runs.iterdir() if p.is_dir() and p.suffix != ".private")

    def train(self, config: ExperimentConfig, resume: bool) -> Path:
        """Stands for `experiment.run_experiment`."""
        folder = Path(config.output.dir) / config.name
        assert folder.exists() == resume
        assert config.evaluation.splits == ("validation",)
        self.started.append((config.name, resume))
        folder.with_name(f"{config.name}.private").mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(settle(config, NUM_CLIENTS)))
        (folder / "environment.json").write_text(json.dumps({"num_clients": NUM_CLIENTS}))
        self.before(config.name)
        self.now += 10
        mode = "shared_private" if config.adapters.private.enabled else "shared_only"
        # Another mode, another metric and another split are there too, and better.
        rows = [
            row(value=self.figure(config), mode=mode, seed=config.seed),
            row(value=0.9, mode="private_only"),
            row(value=0.9, mode=mode, k=5),
            row(value=0.9, mode=mode, candidates="sampled99"),
            popularity(),
        ]
        extra = {
            "config": config.model_dump(mode="json"),
            "environment": {"versions": {"torch": "2"}, "cpu": "a <CPU>", "seed": config.seed},
            "costs": COSTS,
            "per_user": {"gain_log_rank": [0.5, -0.5, None]},
        }
        write_results(folder / "results.json", rows, extra)
        self.before(f"{config.name} ended")
        return folder

    def evaluate(self, folder: Path, budget: str, openings: Path) -> list[ResultRow]:
        """Stands for `study.study_run`."""
        assert openings == self.results / "test_openings.json"
        assert (folder / "results.json").exists()
        self.evaluated.append((folder.name, budget))
        self.before(f"{folder.name} evaluated")
        self.now += 4
        return [row(split="test", value=0.08), popularity(split="test")]

    def script(
        self,
        script: Path,
        arguments: Sequence[str],
        *,
        config: Path,
        seed: int,
        output: Path,
        openings: Path,
    ) -> None:
        """Stands for `scripts.call_script`."""
        assert openings == self.results / "test_openings.json"
        self.started.append((config.name, False))
        rows = [
            row(method="sasrec", mode="none", value=0.12, split=split)
            for split in ("validation", "test")
        ]
        write_results(output, [*rows, popularity()], {"costs": {"epochs": 3}})


COSTS = {
    "rounds": 3,
    "client_rounds": 10,
    "shared_client_steps": 1000,
    "private_client_steps": 2000,
    "bytes_up": 20_000_000,
    "bytes_down": 40_000_000,
    "round_seconds": 120.0,
}
