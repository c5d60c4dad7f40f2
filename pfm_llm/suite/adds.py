"""A run less another over the same users: what a part of the method adds, or a swap changes."""

from pathlib import Path

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import Task
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation import comparison
from pfm_llm.evaluation.personality.estimates import Bootstrap, paired_difference
from pfm_llm.evaluation.results import ResultRow
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.study.qualities import read_qualities
from pfm_llm.suite.plan import ADDS

_SUFFIX = {Mode.SHARED_PRIVATE: "", Mode.SHARED_ONLY: "_shared"}


def adds_rows(
    whole: Path, without: Path, config: ExperimentConfig, budget: str, prefix: str = ADDS
) -> list[ResultRow]:
    """Rows ``adds_log_rank`` and ``adds_ndcg``, and the same with ``_shared`` for the shared part.

    Args:
        whole: The folder of the run that has the part, or that could replace the other one.
        without: The folder of the run that does without it, or the other one.
        config: Of the run whose rows they are.
        budget: Label of the budget in the rows.
        prefix: `plan.ADDS` or `plan.BESIDE`.

    Raises:
        DataError: A folder lacks the figures of its users, or they are other users.
    """
    full, cut = read_qualities(whole), read_qualities(without)
    if not np.array_equal(full.users, cut.users):
        raise DataError(
            f"{whole.name} and {without.name} were measured on other users; give both the same data"
        )
    evaluation = config.evaluation
    bootstrap = Bootstrap(evaluation.bootstrap, evaluation.confidence, config.seed)
    figures = {
        f"{prefix}_{name}{suffix}": paired_difference(
            full.of[mode][name], cut.of[mode][name], bootstrap
        )
        for mode, suffix in _SUFFIX.items()
        if mode in full.of and mode in cut.of
        for name in full.of[mode]
    }
    return comparison.estimate_rows(config, "test", Task.NEXT_ITEM, figures, budget)
