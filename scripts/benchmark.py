"""Run what a suite of experiments is missing; stop it at any moment, start it again to go on."""

import argparse
import sys

from _cli import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", required=True, metavar="FILE", help="YAML file of the suite")
    parser.add_argument("--budget", default="small", help="one of the suite's (default: small)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these runs")
    parser.add_argument("--list", action="store_true", help="say what is done, and run nothing")
    parser.add_argument("--results", default="results", metavar="FOLDER", help="default: results")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave the run folders of the grid values that lost (without it, any start that "
        "finds them deletes them)",
    )
    arguments = parser.parse_args()
    going_on = "interrupted; the same command goes on from the last commit"
    run_safely(show if arguments.list else benchmark, arguments, going_on)


def show(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.suite.plan import make_plan
    from pfm_llm.suite.status import list_text

    plan = make_plan(Path(arguments.suite), arguments.budget, arguments.only)
    print(list_text(plan, Path(arguments.results)))


def benchmark(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.suite.plan import make_plan
    from pfm_llm.suite.report.page import write_report
    from pfm_llm.suite.running import Tools, run_suite
    from pfm_llm.suite.status import list_text

    results = Path(arguments.results)
    plan = make_plan(Path(arguments.suite), arguments.budget, arguments.only)
    failures = run_suite(plan, results, Tools.real(), arguments.keep)
    print(f"\n{list_text(plan, results)}")
    for run, message in failures.items():
        print(f"error: {run}: {message}", file=sys.stderr)
    print(write_report(results / plan.suite / plan.budget))
    if failures:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
