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
    ranked: Annotated[
        bool,
        typer.Option(
            "--ranked",
            help="Also write the ranked list of each user, as TREC files and as Parquet, to the "
            "run's private folder.",
        ),
    ] = False,
    ranked_to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the ranked lists to this folder instead."),
    ] = None,
) -> None:
    """Evaluate a run beside the baselines, and rewrite its results."""
    from pfm_llm.cli.ending import print_ending
    from pfm_llm.runs.experiment import evaluate_run
    from pfm_llm.runs.folders import RunFolders

    folder = options.run_folder(run, runs)
    if ranked and ranked_to is None:
        ranked_to = RunFolders.of(folder).ranked
    evaluate_run(folder, against or [], ranked_to)
    if is_main_process():
        if ranked_to is not None:
            print(f"\nranked lists of the users, for you alone: {ranked_to}")
        print_ending(folder)
