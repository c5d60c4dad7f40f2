"""Time the rounds of several methods in turn, on the embedded model and data.

- pfm: the default, with a private LoRA that is read off the history;
- pfm_embedding: the user embedding alone;
- no_pass: pfm without a pass of the language model over histories.

Each lap trains some rounds of each method, one after another, so that whatever else the machine
does hits all alike; the ratios are those within a lap.

    python benchmarks/rounds.py
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.base.processes import Processes

METHODS = {
    "pfm": ["method=pfm"],
    "pfm_embedding": ["method=pfm_embedding"],
    "no_pass": ["method=pfm", "ablation=no_pass"],
}
"""Each method to its settings; the first is compared with the others."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="a shipped config, or a file")
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5, help="of each method in a lap")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default: results/rounds/NAME.json")
    arguments = parser.parse_args()
    if min(arguments.laps, arguments.rounds) < 1:
        parser.error("--laps and --rounds must be at least 1")
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Set up, race, write the result and print it."""
    from benchmarks.engine import race, ratios, table
    from benchmarks.engine import rows as rates
    from pfm_llm.base import files
    from pfm_llm.base.processes import start_processes
    from pfm_llm.runs.environment import environment

    processes = start_processes(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            name: rounds_of(arguments, sets, Path(folder) / name, processes)
            for name, sets in METHODS.items()
        }
        for case in cases.values():
            case()  # what the first rounds make once is not raced
        seconds = race(cases, arguments.laps)
    result = {
        "rows": [row | {"unit": "rounds_per_s"} for row in rates(seconds, arguments.rounds)],
        "ratios": ratios(seconds),
        "config": {"config": arguments.config, "laps": arguments.laps, "rounds": arguments.rounds},
        "environment": environment(
            seed=0,
            dtype="bfloat16",
            threads=processes.threads,
            num_processes=processes.count,
            device=processes.device.type,
        ),
    }
    out = arguments.out or ROOT / "results" / "rounds" / f"{Path(arguments.config).stem}.json"
    files.write_json(out, result)
    print(table(result, "rounds_per_s"))


def rounds_of(
    arguments: argparse.Namespace, sets: list[str], folder: Path, processes: "Processes"
) -> Callable[[], None]:
    """A function that trains the next rounds of a method."""
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config
    from pfm_llm.federation.exchange import LocalExchange
    from pfm_llm.runs.folders import RunFolders
    from pfm_llm.runs.run import assemble, load_corpus, settled

    config = load_config(find_config(arguments.config), [*sets, f"output.dir={folder}"])
    data = load_corpus(config)
    made = assemble(settled(config, data), data, RunFolders.of(folder / "run"), processes)
    server, clients = made.new_server(), made.clients
    exchange = LocalExchange(server, clients.trainer, clients.store, processes)

    def train() -> None:
        for _ in range(arguments.rounds):
            cohort = server.select_cohort(server.round_under_way)
            server.aggregate(exchange.train(cohort, server.broadcast))

    return train


if __name__ == "__main__":
    main()
