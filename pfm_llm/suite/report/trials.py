"""How many trials each method had: how many models validation chose among.

The number follows from the grid of a run and the weights of its private part, the epochs or rounds
of a script, and the grids of `baselines.selection`. Settings that no grid of the suite varies count
as one, wherever they come from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pfm_llm.evaluation.baselines.likes import num_like_settings
from pfm_llm.evaluation.baselines.selection import BaselineName, num_settings
from pfm_llm.suite.report.reading import SuiteResult


def trials_of_run(results: Sequence[SuiteResult]) -> int:
    """The trials of a run with each seed: grid values times weights of the private part.

    Args:
        results: The results of the run; the seed with most trials counts.
    """
    return max(_trials(result.extra) for result in results)


def trials_of_baseline(method: str, results: Sequence[SuiteResult]) -> int | None:
    """The trials of a baseline; None where nobody knows them.

    Args:
        method: Its name.
        results: All results of the suite; a script's tells what it validated.
    """
    for result in results:
        validated = result.extra.get("validation_history")
        if validated and method in {row.method for row in result.rows}:
            return len(validated)
    if method in list(BaselineName):
        return num_settings(BaselineName(method))
    return num_like_settings().get(method)


def _trials(extra: Mapping[str, Any]) -> int:
    has_private = extra["config"]["adapters"]["private"]["enabled"]
    weights = extra["config"]["evaluation"].get("private_weights") if has_private else None
    return len(extra["grid"]["values"]) * max(1, len(weights or ()))
