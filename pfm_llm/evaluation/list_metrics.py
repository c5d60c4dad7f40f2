"""Metrics of ranked lists for ``evaluate.load``: ``predictions`` and ``references`` of items.

Each folder of `FOLDER` is a metric: ``evaluate.load(f"{FOLDER}/ndcg")``, in the same way
``hit_rate`` and ``mrr``. They are the formulas of `metrics`, and need no network.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.metrics import RANK_METRICS, check_k, mean_over_users

FOLDER = Path(__file__).parent / "loadable"


class ListMetric(evaluate.Metric):
    """A metric of ranked lists.

    ``compute(predictions=..., references=..., k=10, groups=None)`` takes the lists, the best item
    first, and the relevant item of each, or a list of its relevant items, which count by the mean
    over them. Items are all integers or all strings. Lists of one user have an equal entry in
    ``groups``, and count once, by their mean; without ``groups`` each list is a user's only one.
    The result's key is ``<name>@<k>``, its value in [0, 1].

    Raises:
        ConfigError: ``k`` is below 1.
        DataError: There is no relevant item, or ``groups`` has another length.
    """

    metric: str
    """One of `metrics.RANK_METRICS`; a subclass sets it."""

    def _info(self) -> evaluate.MetricInfo:
        lists = [
            datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value(kind)), "references": relevant}
            )
            # Text comes first: as integers, "07" and "7" would be one item.
            for kind in ("string", "int64")
            for relevant in (datasets.Value(kind), datasets.Sequence(datasets.Value(kind)))
        ]
        return evaluate.MetricInfo(
            description=f"{self.metric} of ranked lists.",
            citation="",
            inputs_description="predictions: lists of items, the best first; references: the "
            "relevant item or items of each; k: the cut-off; groups: the user of each list.",
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
        users = list(range(len(predictions)) if groups is None else groups)
        if len(users) != len(predictions):
            raise DataError(f"{len(predictions)} lists for {len(users)} groups: give one each")
        number = {user: n for n, user in enumerate(dict.fromkeys(users))}
        found = [
            (_rank(list(own), item, k), number[user])
            for own, relevant, user in zip(predictions, references, users, strict=True)
            for item in (relevant if isinstance(relevant, list) else [relevant])
        ]
        ranks, numbers = np.array(found, np.int64).reshape(-1, 2).T
        return {f"{self.metric}@{k}": mean_over_users(RANK_METRICS[self.metric](ranks, k), numbers)}


def _rank(items: list[object], relevant: object, k: int) -> int:
    """The place of the relevant item, from 1; below the cut-off if the list lacks it."""
    return items.index(relevant) + 1 if relevant in items else k + 1
