"""What a command prints when a run is trained or measured."""

from pathlib import Path


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
