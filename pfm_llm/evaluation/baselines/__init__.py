"""Central baselines that need no gradient.

All are fitted once, on training histories alone, and then score any histories of the same
catalogue; hyperparameters are chosen on validation and nothing is refitted for the test. `likes`
holds those of the task ``like``.
"""

from pfm_llm.evaluation.baselines.common import Baseline, Histories, ScoreMatrix, Scorer
from pfm_llm.evaluation.baselines.ease import MAX_DENSE, Ease
from pfm_llm.evaluation.baselines.ease_markov import EaseMarkov
from pfm_llm.evaluation.baselines.item_knn import ItemKnn
from pfm_llm.evaluation.baselines.likes import FittedLikes, fit_like_baselines
from pfm_llm.evaluation.baselines.markov import MarkovRecency
from pfm_llm.evaluation.baselines.popularity import Popularity
from pfm_llm.evaluation.baselines.selection import (
    BaselineName,
    FittedBaseline,
    HeldOutQueries,
    fit_baselines,
    parse_names,
)

__all__ = [
    "MAX_DENSE",
    "Baseline",
    "BaselineName",
    "Ease",
    "EaseMarkov",
    "FittedBaseline",
    "FittedLikes",
    "HeldOutQueries",
    "Histories",
    "ItemKnn",
    "MarkovRecency",
    "Popularity",
    "ScoreMatrix",
    "Scorer",
    "fit_baselines",
    "fit_like_baselines",
    "parse_names",
]
