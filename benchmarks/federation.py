"""Run a federation on Flower on this machine: TLS, node authentication, three silos of real users.

Each of three nodes has a file of its own users of MovieLens-100K, and a worker that holds the real
language model. The run is submitted with `flwr run`, watched, measured on the nodes and exported.
Then one process that has all data computes the last round again. All listens on loopback alone,
and every process is ended by its id.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from benchmarks.federating.silos import Silos

NODES = ("n01", "n02", "n03")
_TIMEOUT = 600.0
_NORM = 4.0
"""Bound of an update under masks, as in `benchmarks/masks.py`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--cohort", type=int, default=64, help="clients of a round, at all nodes")
    parser.add_argument(
        "--masks", action="store_true", help="what leaves a node is a sum under masks"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "runs" / "federation",
        help="keys, data, logs, runs; made anew",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="default: results/federation/loopback[_masks].json"
    )
    arguments = parser.parse_args()
    name = "loopback_masks.json" if arguments.masks else "loopback.json"
    arguments.out = arguments.out or ROOT / "results/federation" / name
    if arguments.rounds < 2 or arguments.cohort < 1:
        parser.error("--rounds must be at least 2 and --cohort at least 1")
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: federate(arguments), "interrupted; all processes are ended")


def federate(arguments: argparse.Namespace) -> None:
    """Set up, run, measure, compare, write the result and print it.

    Raises:
        LaunchError: Flower is not installed, or a process or the run has failed.
    """
    from benchmarks.federating.agreement import difference_of_last_round
    from benchmarks.federating.authority import make_authority
    from benchmarks.federating.lab import Lab, flower_is_installed
    from benchmarks.federating.silos import write_silos
    from pfm_llm.base import assets, files
    from pfm_llm.base.errors import LaunchError

    if not flower_is_installed():
        raise LaunchError(
            "Flower is not installed beside this Python; run `make federation`, or "
            'pip install -c constraints-flower.txt -e ".[flower]"'
        )
    # Elsewhere each node unpacks its own copy of the language model.
    os.environ.setdefault("PFM_LLM_CACHE", str(assets.cache_dir()))
    assets.smollm2_135m()
    folder = arguments.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    files.make_private_dir(folder)
    silos = write_silos(folder, NODES)
    sites = _write_sites(silos, arguments.masks)
    config = _write_config(folder, silos.items, arguments)
    run = folder / "runs" / "federation"
    load, started = os.getloadavg()[0], time.perf_counter()
    print(f"starting a SuperLink, and a worker and a SuperNode for each of {', '.join(NODES)} …")
    with Lab(folder, make_authority(folder / "keys", NODES), sites) as lab:
        up = time.perf_counter()
        print(f"up after {up - started:.0f} s; the run begins")
        lab.run(config, Watch(run, arguments.rounds).show, _TIMEOUT)
        ended = time.perf_counter()
    print(f"{run} is complete, and all processes are ended; one process computes the last round …")
    result = {
        **_figures(run),
        "start_seconds": up - started,
        "run_seconds": ended - up,
        "update_relative_difference": difference_of_last_round(run, silos),
        "load_average": {"at_start": load, "at_end": os.getloadavg()[0]},
    }
    files.write_json(arguments.out, result)
    print(summary(result))


class Watch:
    """Prints a line for each round that a run has ended.

    Args:
        run: The run's folder, which need not be there yet.
        num_rounds: How many rounds it will have.
    """

    def __init__(self, run: Path, num_rounds: int) -> None:
        self._run, self._num_rounds, self._shown = run, num_rounds, 0

    def show(self) -> None:
        """Print the lines of the rounds that have ended since the last call."""
        from pfm_llm.base.metrics_log import MetricsLog

        for record in MetricsLog(self._run / "metrics.jsonl").read()[self._shown :]:
            print(line_of(record, self._num_rounds), flush=True)
            self._shown += 1


def line_of(record: dict[str, Any], num_rounds: int) -> str:
    """A round of the log in a line."""
    up, down = (record[name] / 1e6 for name in ("bytes_up", "bytes_down"))
    loss = "no loss" if record["loss"] is None else f"loss {record['loss']:.4f}"
    return (
        f"round {record['round']}/{num_rounds}: {loss}, {record['num_clients']} clients of "
        f"{record['nodes']} nodes ({record['refused']} refused), {record['seconds']:.1f} s, "
        f"{up:.1f} MB up, {down:.1f} MB down"
    )


def summary(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    seconds = ", ".join(f"{value:.1f}" for value in result["seconds_of_rounds"])
    lines = [
        f"rounds: {seconds} s; the whole run {result['run_seconds']:.0f} s with workers up",
        f"update of the last round against one process: {result['update_relative_difference']:.1e}",
    ]
    for row in result["rows"]:
        name = row["method"] if row["mode"] == "none" else row["mode"]
        if row["metric"] == "ndcg":
            lines.append(
                f"{name:<15} ndcg@{row['k']} {row['value']:.4f} [{row['ci_low']:.4f}, "
                f"{row['ci_high']:.4f}] on {row['split']}, {row['num_users']} users"
            )
    return "\n".join(lines)


def _write_sites(silos: "Silos", masks: bool) -> dict[str, Path]:
    """The ``site.yaml`` of each node."""
    from benchmarks.federating.authority import masks_sections

    known: dict[str, dict[str, Any]] = {node: {} for node in NODES}
    if masks:
        found = masks_sections({node: silos.private(node) for node in NODES})
        known = {node: {"masks": section} for node, section in found.items()}
    return {node: silos.write_site(node, threads=1, **more) for node, more in known.items()}


def _write_config(folder: Path, items: Path, arguments: argparse.Namespace) -> Path:
    federation: dict[str, Any] = {"num_rounds": arguments.rounds, "cohort_size": arguments.cohort}
    if arguments.masks:
        federation |= {"masks": True, "stages": [{"clip": {"norm": _NORM}}]}
    tree = {
        "name": "federation",
        "data": {"items": str(items)},
        "federation": federation,
        # Three rounds choose nothing, and test is not opened for them.
        "evaluation": {"every": 0, "splits": ["validation"]},
        "runtime": {"threads": 1},
        "output": {"dir": str(folder / "runs"), "checkpoint_every": 1},
    }
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _figures(run: Path) -> dict[str, Any]:
    """What the run's own files say."""
    from pfm_llm.base import files
    from pfm_llm.base.metrics_log import MetricsLog

    results, rounds = (
        files.read_json(run / "results.json"),
        MetricsLog(run / "metrics.jsonl").read(),
    )
    environment = results["environment"]
    environment["versions"]["flwr"] = importlib.metadata.version("flwr")
    del results["config"]["output"]
    results["config"]["data"]["items"] = "items.csv"
    return {
        "rows": results["rows"],
        "round_seconds": max(record["seconds"] for record in rounds),
        "seconds_of_rounds": [record["seconds"] for record in rounds],
        "rounds": rounds,
        "config": results["config"],
        "environment": environment,
    }


if __name__ == "__main__":
    main()
