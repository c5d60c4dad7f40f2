"""``pfm config``: shipped configs, and what a config resolves to."""

from collections.abc import Callable
from typing import Annotated

import typer

from pfm_llm.cli import options

HELP = "List the shipped configs, or show what a config resolves to."


def show(
    config: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="YAML file, or a name of `pfm config list`.")
    ] = "quickstart",
    overrides: options.Overrides = None,
) -> None:
    """Print every setting that a config resolves to."""
    from pfm_llm.config.show import describe

    print(describe(config, overrides or []))


def list_configs() -> None:
    """List the names of the shipped configs, with the first line of each."""
    from pfm_llm.config.shipped import shipped_folder

    files = sorted(shipped_folder().glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    for file in files:
        first = file.read_text().partition("\n")[0]
        print(f"{file.stem:{width}}  {first.removeprefix('#').strip()}")


COMMANDS: dict[str, Callable[..., None]] = {"show": show, "list": list_configs}
