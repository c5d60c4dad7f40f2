"""``pfm evaluate``, and what is printed when a run is trained or measured."""

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


def print_ending(run: Path) -> None:
    """Print the table, what it says, the commands that show more, and three users' lists.

    The lists come last, since they fill one screen of 100 columns and 30 lines.

    Args:
        run: The folder of a run that was evaluated.
    """
    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import terminal_table
    from pfm_llm.runs.folders import RESULTS_FILE, RunFolders
    from pfm_llm.runs.lists import LISTS_FILE, MARK, read_lists
    from pfm_llm.runs.summary import of_run

    rows, results = read_results(run / RESULTS_FILE)
    confidence = results["config"]["evaluation"]["confidence"]
    print(f"\n{terminal_table(rows, confidence=confidence)}\n")
    print("\n".join(of_run(run, results)))
    print(f"\nrun folder: {run}")
    kept = RunFolders.of(run).private / LISTS_FILE
    if kept.is_file():
        print(f"\nLists of three users; {MARK}")
        for one in read_lists(kept):
            print(f"\n{one.text()}")
