"""Rebuild the tables of README.md and the reports of all suites from the results (make table)."""

import argparse
import functools

from pfm_llm.cli.start import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when README.md is stale"
    )
    run_safely(functools.partial(update, parser.parse_args()))


def update(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.base import files
    from pfm_llm.suite.readme import with_fresh_tables
    from pfm_llm.suite.report.page import write_report
    from pfm_llm.suite.report.reading import suite_folders

    path = Path(__file__).resolve().parent.parent / "README.md"
    text = path.read_text()
    fresh = with_fresh_tables(text, path.parent)
    if arguments.check and fresh != text:
        raise SystemExit("README.md is stale; run make table")
    if fresh == text:
        print("README.md is up to date")
    else:
        files.write_text(path, fresh)
        print("README.md rebuilt")
    if not arguments.check:
        for folder in suite_folders(path.parent / "results"):
            print(write_report(folder))


if __name__ == "__main__":
    main()
