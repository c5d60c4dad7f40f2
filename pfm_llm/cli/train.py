"""``pfm train``, which is also ``accelerate launch -q scripts/fed_train.py``."""

from typing import Annotated

import typer

from pfm_llm.base.errors import ConfigError
from pfm_llm.cli import options
from pfm_llm.cli.start import is_main_process


def train(
    config: options.Config = "quickstart",
    overrides: options.Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of this name.")
    ] = False,
    from_round: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --resume: first go back to the kept commit of round N; later rounds are "
            "deleted.",
        ),
    ] = None,
) -> None:
    """Train a federated recommender and evaluate it.

    The run leaves a folder runs/NAME with its config, results, plots and shared adapter.
    """
    from pfm_llm.config.schema import load_config
    from pfm_llm.config.shipped import find_config

    if from_round is not None and not resume:
        raise ConfigError("--from-round goes with --resume")
    # A wrong key is named before torch is imported, which takes seconds.
    experiment = load_config(find_config(config), overrides or [])

    from pfm_llm.cli.evaluate import print_ending
    from pfm_llm.runs.experiment import run_experiment

    run = run_experiment(experiment, resume=resume, from_round=from_round)
    if is_main_process():
        print_ending(run)
