"""``pfm evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from pfm_llm.cli import options
from pfm_llm.cli.start import is_main_process


def evaluate(
    run: options.Run = None,
    runs: options.Runs = Path("runs"),
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Result files of benchmarks/baselines on the same data; the results gain the "
            "difference to each, paired over users. Takes several; may be repeated.",
        ),
    ] = None,
) -> None:
    """Evaluate a run beside the baselines, and rewrite its results."""
    from pfm_llm.cli.ending import print_ending
    from pfm_llm.runs.experiment import evaluate_run

    folder = options.run_folder(run, runs)
    evaluate_run(folder, against or [])
    if is_main_process():
        print_ending(folder)
