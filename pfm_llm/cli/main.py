"""The application ``pfm`` with all its commands."""

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pfm_llm import __version__
from pfm_llm.cli import config, data, host, node, versions
from pfm_llm.cli.agent import agent
from pfm_llm.cli.audit import audit
from pfm_llm.cli.evaluate import evaluate
from pfm_llm.cli.options import ManyValues
from pfm_llm.cli.push import export, push
from pfm_llm.cli.recommend import recommend
from pfm_llm.cli.start import run_safely
from pfm_llm.cli.suite import suite
from pfm_llm.cli.train import train

_Function = Callable[..., None]


def make_app() -> typer.Typer:
    """The application with all its commands."""
    app = _group("Federated recommendation: train, evaluate, recommend, publish.")
    app.callback()(_options_of_all)
    resume = "interrupted; --resume goes on from the last commit"
    again = "interrupted; the same command goes on from the last commit"
    app.command("train", cls=ManyValues)(_safe(train, resume))
    app.command("evaluate", cls=ManyValues)(_safe(evaluate))
    app.command("recommend")(_safe(recommend))
    app.command("agent")(_safe(agent))
    app.command("push")(_safe(push))
    app.command("export")(_safe(export))
    app.command("audit", cls=ManyValues)(_safe(audit))
    app.command("suite", cls=ManyValues)(_safe(suite, again))
    groups = {"versions": versions, "config": config, "data": data, "node": node, "host": host}
    for name, module in groups.items():
        group = _group(module.HELP)
        group.callback()(lambda: None)  # a group even of a single command
        for command, function in module.COMMANDS.items():
            group.command(command)(_safe(function))
        app.add_typer(group, name=name)
    return app


def main(*words: str) -> None:
    """Run the command that the command line names.

    Args:
        words: Put before the arguments of the command line; a script names its command here.

    Raises:
        SystemExit: Always.
    """
    make_app()(args=[*words, *sys.argv[1:]], prog_name="pfm")


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def _safe(function: _Function, when_interrupted: str = "interrupted") -> _Function:
    """The command within `run_safely`; typer reads its signature."""

    @functools.wraps(function)
    def safe(**options: object) -> None:
        run_safely(functools.partial(function, **options), when_interrupted)

    return safe


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pfm_llm {__version__}")
        raise typer.Exit


def _options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
