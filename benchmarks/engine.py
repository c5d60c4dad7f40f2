"""Race the many-clients pass against PEFT, one client at a time, on the embedded model and data.

A client step is the loss of one window of 32 items over the whole catalogue, and its gradients
in the client's shared LoRA, private LoRA and recommender head. Three cases take it:

- stacked_cached: many clients in one pass over cached trunk states, which are read from disk;
- peft_same_layers: PEFT, the same adapted layers, from tokens;
- peft_common_recipe: PEFT, LoRA on all linear layers of all blocks, from tokens.

Repeats alternate between the cases, so that whatever else the machine does hits all alike. The
first two compute the same thing, which is checked before the clock starts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.config.schema import ExperimentConfig

UNIT = "client_steps_per_s"
_SETTINGS = {
    "name": "engine",
    "seed": 0,
    "data": {"source": "movielens-100k"},
    "prompt": "next_item.v1",
    "items": {"encoder": "backbone"},
    "window": {"items": 32, "max_windows": 1, "reading": "tokens"},
    "tasks": ["next_item"],
    "method": "custom",
    "head": {"dropout": 0.0, "item_dropout": 0.0},
    "federation": {"local": {"schedule": "alternate", "horizon": 1}},
}
_PRIVATE = {"kind": "independent", "rank": 4, "alpha": 8, "head_rank": 4}
"""PEFT has no taste vectors: what is raced has a LoRA as its private part."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each case")
    parser.add_argument("--clients", type=int, default=16, help="clients with a window each")
    parser.add_argument(
        "--num-layers", type=int, default=None, help="adapted layers (default: the config's)"
    )
    parser.add_argument("--threads", type=int, default=None, help="default: all usable cores")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine.json")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.clients) < 1:
        parser.error("--repeats and --clients must be at least 1")
    from pfm_llm.base.errors import PfmError
    from pfm_llm.cli.start import prepare

    prepare()  # before torch starts

    try:
        run(arguments)
    except PfmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def run(arguments: argparse.Namespace) -> None:
    """Set up, check, race, write the result and print it."""
    from benchmarks.contenders import Bench
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.runs.environment import environment

    processes = start_processes(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = bench_config(folder, arguments.num_layers)
        bench = Bench.build(config, arguments.clients, processes)
        seconds_to_fill = bench.fill_trunk_cache()
        agreement = bench.check()
        seconds = race(bench.cases(), arguments.repeats)
    here = environment(
        seed=config.seed,
        dtype=str(bench.experiment.model.backbone.dtype).removeprefix("torch."),
        threads=processes.threads,
        num_processes=processes.count,
        device=processes.device.type,
    )
    result = {
        "rows": rows(seconds, arguments.clients),
        "ratios": ratios(seconds),
        "agreement": agreement,
        "trunk_cache_fill_s_per_client": round(seconds_to_fill / arguments.clients, 4),
        "config": bench.describe(),
        "environment": here
        | {name.lower(): os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }
    files.write_json(arguments.out, result)
    print(table(result))


def bench_config(folder: str, num_layers: int | None = None, **sections: Any) -> "ExperimentConfig":
    """The next item, with a private LoRA, from all tokens of one window of each client.

    Args:
        folder: Where trunk states go.
        num_layers: Adapted layers; None: the default.
        sections: Sections of the config in place of those of the bench.
    """
    from pfm_llm.config.schema import parse_config

    adapters: dict[str, Any] = {"private": _PRIVATE}
    if num_layers is not None:
        adapters["num_layers"] = num_layers
    tree = {**_SETTINGS, "adapters": adapters, "output": {"dir": folder}, **sections}
    return parse_config(tree, origin="benchmarks/engine.py")


def race(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the cases in alternation.

    Args:
        cases: What to time; each is called once per repeat.
        repeats: How often.
        clock: Seconds that only grow.

    Returns:
        For each case the seconds of every repeat.
    """
    from pfm_llm.base.progress import Progress

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with Progress(repeats * len(cases), "racing", unit="laps") as progress:
        for _ in range(repeats):
            for name, case in cases.items():
                started = clock()
                case()
                seconds[name].append(clock() - started)
                progress.update(1, last=name)
    return seconds


def rows(seconds: Mapping[str, Sequence[float]], num_clients: int) -> list[dict[str, Any]]:
    """Client steps per second of each case: the slowest repeat, the median, and every one."""
    found = []
    for case, times in seconds.items():
        rates = [num_clients / time for time in times]
        found.append(
            {
                "case": case,
                "unit": UNIT,
                "min": min(rates),
                "median": statistics.median(rates),
                "repeats": len(rates),
                "values": rates,
            }
        )
    return found


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How many times as fast the first case is as each other, within the same repeat."""
    first, *others = seconds
    found = {}
    for other in others:
        pairs = zip(seconds[other], seconds[first], strict=True)
        values = [slow / fast for slow, fast in pairs]
        found[f"{first}/{other}"] = {"min": min(values), "median": statistics.median(values)}
    return found


def table(result: Mapping[str, Any], unit: str = UNIT) -> str:
    """The result for a terminal."""
    lines = [f"{'case':<20} {'min':>8} {'median':>8}  {unit}"]
    for row in result["rows"]:
        lines.append(f"{row['case']:<20} {row['min']:>8.2f} {row['median']:>8.2f}")
    for name, ratio in result["ratios"].items():
        lines.append(f"{name}: {ratio['median']:.1f} times (at least {ratio['min']:.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
