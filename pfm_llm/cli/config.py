"""``pfm config``: the shipped configs, and the resolved settings of a config."""

from collections.abc import Callable
from typing import Annotated

import typer

from pfm_llm.cli import options

HELP = "List the shipped configs, or show the resolved settings of one config."


def show(
    config: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="YAML file, or a name of `pfm config list`.")
    ] = "quickstart",
    overrides: options.Overrides = None,
) -> None:
    """Print every setting of a config, with the origin of its value."""
    from pfm_llm.config.show import describe

    print(describe(config, overrides or []))


def list_configs() -> None:
    """List the shipped configs: name and first line."""
    from pfm_llm.config.shipped import shipped_folder

    files = sorted(shipped_folder().glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    for file in files:
        first = file.read_text().partition("\n")[0]
        print(f"{file.stem:{width}}  {first.removeprefix('#').strip()}")


COMMANDS: dict[str, Callable[..., None]] = {"show": show, "list": list_configs}
