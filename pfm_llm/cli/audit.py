"""``pfm audit``."""

from pathlib import Path
from typing import Annotated

import typer

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli import options

_Run = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="Run, by folder or name; default: the newest of --runs."),
]
_Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Audit an experiment that was not run: a YAML file, or a name of `pfm config list`.",
    ),
]
_Users = Annotated[int, typer.Option(min=6, help="Users that are attacked.")]
_Passes = Annotated[
    float,
    typer.Option(
        min=0, help="Mean participations in training an adapter on half of the users; 0: none."
    ),
]
_Norm = Annotated[float, typer.Option(help="Bound of an update where it is clipped.")]
_Noise = Annotated[
    float, typer.Option(help="Standard deviation of the noise on a sum, over --norm.")
]
_Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the figures to this JSON file.")
]


def audit(
    run: _Run = None,
    runs: options.Runs = Path("runs"),
    config: _Config = None,
    overrides: options.Overrides = None,
    users: _Users = 128,
    passes: _Passes = 2.5,
    norm: _Norm = 1.0,
    noise: _Noise = 8.0,
    out: _Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Attack what a federation sends, and say what leaks: in the clear, clipped, masked, noised.

    Measures how well a user's items, and who took part, are read from one message, a sum and an
    adapter. Everything stays on this machine, and no figure is of one user.
    """
    if run is not None and config is not None:
        raise ConfigError("give a run or --config, not both")
    if overrides and config is None:
        raise ConfigError("--set goes with --config; a run has its settings")

    import json

    from pfm_llm.audit.audit import Plan, audit_config, audit_run
    from pfm_llm.audit.modes import Protection
    from pfm_llm.audit.report import report
    from pfm_llm.base import files
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config

    plan = Plan(users=users, passes=passes, protection=Protection(norm, noise))
    if config is not None:
        found = audit_config(load_config(find_config(config), overrides or []), plan)
    else:
        found = audit_run(options.run_folder(run, runs), plan)
    if out is not None:
        files.write_json(out, found)
    print(json.dumps(found, indent=2) if as_json else report(found["rows"]))
