"""Evaluate a run on held-out data, beside the baselines, and rewrite its results."""

import argparse

from _cli import is_main_process, run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default=None, help="run folder (default: the newest in runs/)")
    parser.add_argument("--runs", default="runs", help="where to look for the newest run")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="result files of benchmarks/baselines on the same data: adds the difference to each, "
        "paired over users",
    )
    run_safely(evaluate, parser.parse_args())


def evaluate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.evaluation.results import read_results
    from pfm_llm.evaluation.tables import terminal_table
    from pfm_llm.runs.experiment import evaluate_run
    from pfm_llm.runs.folders import RESULTS_FILE, newest_run
    from pfm_llm.runs.summary import COMPARISONS

    run = Path(arguments.run) if arguments.run else newest_run(arguments.runs)
    evaluate_run(run, [Path(file) for file in arguments.against])
    if is_main_process():
        rows, extra = read_results(run / RESULTS_FILE)
        print(f"\n{terminal_table(rows)}")
        for row in extra[COMPARISONS]:
            interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
            print(f"{row['split']} {row['metric']}@{row['k']}: {row['value']:+.4f} {interval}")
        print(f"\nrun folder: {run}")


if __name__ == "__main__":
    main()
