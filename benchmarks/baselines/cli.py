"""The command line of the trained baselines; nothing heavy is imported before it is read."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every trained baseline."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of an experiment")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. data.split=last_fraction; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=None, help="default: the config's")
    parser.add_argument(
        "--grid", action="store_true", help="choose among several settings on validation"
    )
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    return parser


def run_safely(
    command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace
) -> None:
    """Run a command; a deliberate error is one message and its exit code."""
    from scripts._cli import prepare

    prepare()  # before torch starts
    from pfm_llm.errors import PfmError

    try:
        command(arguments)
    except PfmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
