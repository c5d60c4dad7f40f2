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
            help="Result files of benchmarks/baselines on the same data: adds the difference to "
            "each, paired over users; takes several, and repeats.",
        ),
    ] = None,
) -> None:
    """Evaluate a run beside the baselines, and rewrite its results."""
    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import terminal_table
    from pfm_llm.runs.experiment import evaluate_run
    from pfm_llm.runs.folders import RESULTS_FILE
    from pfm_llm.runs.summary import of_run

    folder = options.run_folder(run, runs)
    evaluate_run(folder, against or [])
    if is_main_process():
        rows, _ = read_results(folder / RESULTS_FILE)
        print(f"\n{terminal_table(rows)}\n")
        print("\n".join(of_run(folder)))
        print(f"\nrun folder: {folder}")
