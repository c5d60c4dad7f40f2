"""Measure what private gradient steps add to a private LoRA that is read off the history.

Each client of a finished run takes the guarded steps of `pfm_llm.client.private_steps` on its own
LoRA, and is served with it and with what was read alone. Differences are paired over users.

    python benchmarks/private_steps.py runs/quickstart
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `benchmarks` is a package however this is started

if TYPE_CHECKING:
    from pfm_llm.runs.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run whose private part is a hyper_lora")
    parser.add_argument("--steps", type=int, default=1, help="steps of each client")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--out", type=Path, default=None, help="default: results/private-steps/…")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Take the steps, write the result and print it."""
    from pfm_llm.base import files
    from pfm_llm.config.cut_offs import HEADLINE_K
    from pfm_llm.evaluation.personality.estimates import Bootstrap
    from pfm_llm.protocol.types import Mode
    from pfm_llm.runs.environment import environment_of
    from pfm_llm.runs.measuring import evaluation_task, measure, only
    from pfm_llm.runs.opening import open_run
    from pfm_llm.runs.study.pieces import steps_over_read

    opened, trained = open_run(arguments.run)
    stepping = with_steps(opened, arguments.steps)
    config = stepping.config
    held_out = getattr(stepping.data.split, arguments.split)
    task = evaluation_task(stepping, trained, held_out, [Mode.SHARED_PRIVATE])
    task = only(task, Mode.SHARED_PRIVATE, liked=None)
    found = steps_over_read(
        stepping, task, measure(stepping, task), Bootstrap(seed=config.seed), HEADLINE_K
    )
    rows = [
        {"metric": name, "split": arguments.split, "candidates": "full", **vars(value)}
        for name, value in found.items()
    ]
    result = {
        "rows": rows,
        "config": config.model_dump(mode="json"),
        "environment": environment_of(opened),
    }
    out = arguments.out or ROOT / "results" / "private-steps" / f"{arguments.run.name}.json"
    files.write_json(out, result)
    for row in rows:
        low, high = row["ci_low"], row["ci_high"]
        print(f"{row['metric']:28} {row['value']:+.4f} [{low:+.4f}, {high:+.4f}]")


def with_steps(opened: "Run", steps: int) -> "Run":
    """The same run whose clients take steps on what they read."""
    from pfm_llm.config.settings import with_setting
    from pfm_llm.runs.run import make_trainer

    config, clients = with_setting(opened.config, "adapters.private.steps", steps), opened.clients
    trainer = make_trainer(config, opened.model, clients.histories, clients.store)
    clients = dataclasses.replace(clients, trainer=trainer)
    return dataclasses.replace(opened, config=config, clients=clients)


if __name__ == "__main__":
    main()
