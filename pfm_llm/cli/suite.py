"""``pfm suite``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

_Name = Annotated[
    str,
    typer.Option(
        "--suite", metavar="FILE|NAME", help="YAML file, or a shipped one such as suites/ml100k."
    ),
]
_Keep = Annotated[
    bool,
    typer.Option(
        "--keep",
        help="Keep the run folders of the grid values that were not chosen; without this option, "
        "each start deletes them.",
    ),
]


def suite(
    name: _Name,
    budget: Annotated[str, typer.Option(help="One of the suite's budgets.")] = "small",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME...", help="Only these runs. Takes several; may be repeated."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Print the state of each run, and run nothing.")
    ] = False,
    results: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of all results.")] = Path(
        "results"
    ),
    keep: _Keep = False,
) -> None:
    """Run the experiments of a suite that have no result yet.

    You may stop it at any moment. The same command continues.
    """
    from pfm_llm.config.shipped import find_config
    from pfm_llm.suite.plan import make_plan
    from pfm_llm.suite.status import list_text

    plan = make_plan(find_config(name), budget, only or [])
    if show:
        print(list_text(plan, results))
        return

    from pfm_llm.suite.report.page import write_report
    from pfm_llm.suite.running import Tools, run_suite

    failures = run_suite(plan, results, Tools.real(), keep)
    print(f"\n{list_text(plan, results)}")
    for run, message in failures.items():
        print(f"error: {run}: {message}", file=sys.stderr)
    print(write_report(results / plan.suite / plan.budget))
    if failures:
        raise typer.Exit(2)
