"""Hostile input at random: a few seconds of it in every test run, and a long run by `make fuzz`.

A test asks `hostile` for the settings of its `given`, counts what it tried, and hands the counts to
`report`. In a long run, where ``PFM_FUZZ`` says how many inputs are tried, `report` writes them to
``results/faults/<name>.json``, from which ``results/claims.yaml`` takes its figures.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import torch

from pfm_llm.base.files import write_json
from pfm_llm.runs.environment import environment

NUM_INPUTS = int(os.environ.get("PFM_FUZZ", "0"))
"""Updates to try in a long run, and ten times the folders; 0: a short run."""
SEED = int(os.environ.get("PFM_FUZZ_SEED", "0"))

_RESULTS = Path(__file__).parents[2] / "results" / "faults"

# Of the start: a long run must not name a commit that was made while it went on.
_HERE = (
    environment(seed=SEED, dtype="float32", threads=torch.get_num_threads(), num_processes=1)
    if NUM_INPUTS
    else None
)


def hostile(short: int, long: int) -> Callable[[Any], Any]:
    """A decorator for a function under `hypothesis.given`: how many examples, from which seed.

    Args:
        short: Examples of a short run, which should take a few seconds.
        long: Examples of a long run, a share of `NUM_INPUTS`.
    """
    settings = hypothesis.settings(
        max_examples=long or short,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: hypothesis.seed(SEED)(settings(test))


def report(name: str, counts: Mapping[str, int]) -> None:
    """Write the counts of a long run to ``results/faults/<name>.json``; a short run writes nothing.

    Args:
        name: What was fuzzed, such as ``updates``.
        counts: Figures by name, among them ``inputs`` and ``untyped_errors``.
    """
    if _HERE is not None:
        write_json(_RESULTS / f"{name}.json", {"environment": _HERE, **counts})
