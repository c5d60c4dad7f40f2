"""The command line of the trained baselines; nothing heavy is imported before it is read."""

import argparse
from pathlib import Path


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
