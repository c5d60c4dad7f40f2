"""Measure the peak memory of runs, and compare it with the estimate that they make at their start.

A run is a process of its own, with the settings of a shipped config and few rounds. Memory does not
depend on the number of rounds once the caches of kernels are full, which takes about five rounds.
``--queries`` evaluates on so many users of each split alone: chunks of clients are of one size,
however many there are.

    python benchmarks/memory.py quickstart
    python benchmarks/memory.py games --set data.source=... --set data.max_users=10000 --queries 256
"""

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.config.schema import ExperimentConfig
    from pfm_llm.runs.run import Corpus

_UNTOLD = {"data.source", "data.items"}
"""Settings that name places of a machine."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a shipped config, or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--queries", type=int, default=None, help="users to evaluate (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/memory/<name>.json"
    )
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Run the config in a process of its own, write the result and print it."""
    from pfm_llm.base import files

    rounds = f"federation.num_rounds={arguments.rounds}"
    with tempfile.TemporaryDirectory() as folder:
        settings = [*arguments.settings, rounds, f"output.dir={folder}"]
        child = multiprocessing.get_context("spawn").Process(
            target=_train, args=(arguments.config, settings, arguments.queries)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(child.exitcode)
        (path,) = Path(folder).glob("*/results.json")
        results = files.read_json(path)
    result = summary(results, [*arguments.settings, rounds], arguments.queries)
    out = arguments.out or ROOT / "results" / "memory" / f"{results['config']['name']}.json"
    files.write_json(out, result)
    print(
        f"{out.stem}: {result['estimated_bytes'] / 1e9:.2f} GB estimated, "
        f"{result['measured_bytes'] / 1e9:.2f} GB measured, {result['estimate_over_measured']:.2f}"
    )


def summary(results: dict[str, Any], settings: list[str], queries: int | None) -> dict[str, Any]:
    """What a result file holds, from the ``results.json`` of a run."""
    environment = results["environment"]
    estimate, measured = environment["memory"], results["costs"]["peak_memory_bytes"]
    return {
        "estimated_bytes": estimate["bytes"],
        "measured_bytes": measured,
        "estimate_over_measured": estimate["bytes"] / measured,
        "phase": estimate["phase"],
        "parts": estimate["parts"],
        "settings": [one for one in settings if one.partition("=")[0] not in _UNTOLD],
        "evaluated_users": queries,
        "environment": {k: v for k, v in environment.items() if k not in ("memory", "data")},
    }


def _train(config: str, settings: list[str], queries: int | None) -> None:
    """Train and evaluate, in this process."""
    from pfm_llm.cli.start import run_safely
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.runs.experiment import run_experiment
    from pfm_llm.runs.run import load_corpus

    def load(config: "ExperimentConfig") -> "Corpus":
        data = load_corpus(config)
        return data if queries is None else with_queries(data, queries)

    def command() -> None:
        with mock.patch("pfm_llm.runs.experiment.load_corpus", load):
            run_experiment(load_config(find_config(config), settings))

    run_safely(command)


def with_queries(data: "Corpus", count: int) -> "Corpus":
    """Data of whose held-out splits the first ``count`` users are evaluated."""
    split = data.split
    fewer = dataclasses.replace(
        split, test=split.test.take(range(count)), validation=split.validation.take(range(count))
    )
    return dataclasses.replace(data, split=fewer)


if __name__ == "__main__":
    main()
