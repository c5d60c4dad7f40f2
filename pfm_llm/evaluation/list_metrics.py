"""Metrics of ranked lists for ``evaluate.load``: ``predictions`` and ``references`` of items.

Each folder of `FOLDER` is a metric: ``evaluate.load(f"{FOLDER}/ndcg")``, in the same way
``hit_rate`` and ``mrr``. They are the formulas of `metrics`, and need no network.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np

from pfm_llm.evaluation.metrics import RANK_METRICS, check_k, mean_over_users

FOLDER = Path(__file__).parent / "loadable"


class ListMetric(evaluate.Metric):
    """A metric of ranked lists with one relevant item each.

    ``compute(predictions=..., references=..., k=10, groups=None)`` takes the lists, the best item
    first, and the relevant item of each. Items are all integers or all strings. Lists of one user
    have an equal entry in ``groups``, and count once, by their mean; without ``groups`` each list
    is a user's only one. The result's key is ``<name>@<k>``, its value in [0, 1].

    Raises:
        ConfigError: ``k`` is below 1.
        DataError: There are no lists, or ``groups`` has another length.
    """

    metric: str
    """One of `metrics.RANK_METRICS`; a subclass sets it."""

    def _info(self) -> evaluate.MetricInfo:
        lists = [
            datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value(kind)),
                    "references": datasets.Value(kind),
                }
            )
            for kind in ("int64", "string")
        ]
        return evaluate.MetricInfo(
            description=f"{self.metric} of ranked lists with one relevant item each.",
            citation="",
            inputs_description="predictions: lists of items, the best first; references: the "
            "relevant item of each; k: the cut-off; groups: the user of each list.",
            features=lists,
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[object]],
        references: Sequence[object],
        k: int = 10,
        groups: Sequence[object] | None = None,
    ) -> dict[str, float]:
        check_k(k)
        ranks = [
            _rank(list(own), item, k) for own, item in zip(predictions, references, strict=True)
        ]
        values = RANK_METRICS[self.metric](np.asarray(ranks, np.int64), k)
        users = range(len(ranks)) if groups is None else groups
        number = {user: n for n, user in enumerate(dict.fromkeys(users))}
        numbers = np.array([number[user] for user in users], np.int64)
        return {f"{self.metric}@{k}": mean_over_users(values, numbers)}


def _rank(items: list[object], relevant: object, k: int) -> int:
    """The place of the relevant item, from 1; below the cut-off if the list lacks it."""
    return items.index(relevant) + 1 if relevant in items else k + 1
