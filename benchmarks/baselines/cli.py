"""The command line of the trained baselines; nothing heavy is imported before it is read."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.baselines.measuring import Train

Trainer = Callable[[argparse.Namespace], "Train"]
"""From the options of a baseline to the function that trains it; imports what that needs."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every trained baseline."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of an experiment")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. data.split=last_fraction; takes several, may be repeated",
    )
    parser.add_argument("--seed", type=int, default=None, help="default: the config's")
    parser.add_argument(
        "--grid", action="store_true", help="choose among several settings on validation"
    )
    parser.add_argument(
        "--openings",
        type=Path,
        default=None,
        metavar="FILE",
        help="file that counts measurements of test; default: test_openings.json beside --output",
    )
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    return parser


def main(parser: argparse.ArgumentParser, trainer: Trainer) -> None:
    """The command of a baseline.

    Args:
        parser: From `make_parser`, with what the baseline adds.
        trainer: Of the baseline.
    """
    arguments = parser.parse_args()
    from pfm_llm.cli.start import run_safely

    run_safely(lambda: run(arguments, trainer), "interrupted; start it again")


def run(arguments: argparse.Namespace, trainer: Trainer) -> None:
    """Train and measure a baseline, write its results and print them; see `measuring.run`."""
    from benchmarks.baselines import measuring

    print(measuring.run(arguments, trainer(arguments)))
