"""Rebuild the tables of README.md from the committed results (make table)."""

import argparse

from _cli import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    run_safely(update, parser.parse_args())


def update(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm import files
    from pfm_llm.readme import with_fresh_tables

    path = Path(__file__).resolve().parent.parent / "README.md"
    text = path.read_text()
    fresh = with_fresh_tables(text, path.parent)
    if fresh == text:
        print("README.md is up to date")
    elif arguments.check:
        raise SystemExit("README.md is stale; run make table")
    else:
        files.write_text(path, fresh)
        print("README.md rebuilt")


if __name__ == "__main__":
    main()
