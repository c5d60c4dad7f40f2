"""Rebuild the tables of README.md and docs/, and the suites' reports, from results (make table)."""

import argparse
import functools

from pfm_llm.cli.start import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when a table is stale"
    )
    run_safely(functools.partial(update, parser.parse_args()))


def update(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.base import files
    from pfm_llm.suite.readme import with_fresh_tables
    from pfm_llm.suite.report.page import write_report
    from pfm_llm.suite.report.reading import suite_folders

    root = Path(__file__).resolve().parent.parent
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text()
        fresh = with_fresh_tables(text, root)
        if fresh == text:
            continue
        if arguments.check:
            raise SystemExit(f"{path.name} is stale; run make table")
        files.write_text(path, fresh)
        print(f"{path.name} rebuilt")
    if not arguments.check:
        for folder in suite_folders(root / "results"):
            print(write_report(folder))


if __name__ == "__main__":
    main()
