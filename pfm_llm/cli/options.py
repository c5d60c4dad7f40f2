"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Run = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Run folder; default: the newest of --runs.")
]
Runs = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to search for the newest run.")]
Config = Annotated[
    str, typer.Option(metavar="FILE|NAME", help="YAML file, or a name of `pfm config list`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE...",
        help="Override a setting: federation.num_rounds=20. Takes several; may be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SigningKey = Annotated[
    Path | None, typer.Option(metavar="PEM", help="File of the private signing key.")
]


def run_folder(run: Path | None, runs: Path) -> Path:
    """The run that ``--run`` names by folder or name; without it, the newest run in ``--runs``.

    Raises:
        ConfigError: There is no run.
    """
    from pfm_llm.runs.folders import find_run

    return find_run(run, runs)


class ManyValues(TyperCommand):
    """A command without arguments whose repeatable options take several values each time.

    ``--set a=1 b=2`` means ``--set a=1 --set b=2``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102
        many = {name for param in self.params if param.multiple for name in param.opts}
        spread: list[str] = []
        option: str | None = None
        for arg in args:
            if arg.startswith("-"):
                option = arg.partition("=")[0]
            elif option in many and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)
