"""Rows of an audit: each figure with its interval, and under which conditions it holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from pfm_llm.audit.attacks import Suspects, item_scores, read_items, union
from pfm_llm.audit.modes import AuditMode
from pfm_llm.audit.view import View
from pfm_llm.evaluation.metrics import auc
from pfm_llm.evaluation.personality.estimates import Bootstrap, estimate

UPDATE, ADAPTER = "update", "adapter"
"""Surfaces of an audit; others are ``sum_<n>`` and ``released_<n>`` of n clients."""
PRECISION, RECALL, MEMBERSHIP = "items_precision", "items_recall", "membership_auc"


_SURFACES = (UPDATE, "sum", "released", ADAPTER)


@dataclass(frozen=True)
class AuditRow:
    """One measured figure.

    Attributes:
        mode: A value of `AuditMode`.
        surface: What is looked at: ``update``, ``sum_<n>``, ``released_<n>`` or ``adapter``.
        metric: `PRECISION`, `RECALL` or `MEMBERSHIP`.
        value: The figure, from 0 to 1.
        ci_low: Lower end of its 95 % bootstrap interval.
        ci_high: Upper end of it.
        num_users: How many users, or sums of users, it is over.
        chance: What a guess has: half of `MEMBERSHIP`; of items, a random choice of as many.
        reader: What the items are read off; of an adapter the score; else empty.
        split: The data that are attacked: training histories.
        candidates: Of the items: the whole catalogue.
    """

    mode: str
    surface: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    num_users: int
    chance: float = 0.5
    reader: str = ""
    split: str = "train"
    candidates: str = "full"


def place_of(row: AuditRow) -> tuple[int, int, int, str]:
    """What rows are sorted by: the mode, the surface, its number of clients, the figure."""
    kind, _, count = row.surface.partition("_")
    mode = list(AuditMode).index(AuditMode(row.mode))
    return mode, _SURFACES.index(kind), int(count or 0), row.metric


_Hits = tuple[float, float, float, float]
"""Precision and recall of a choice of items, and both of a random choice of as many."""


@dataclass
class Findings:
    """What attacks on the views of one surface have found so far.

    Attributes:
        mode: How the updates are protected.
        surface: The surface.
        histories: The items that each client has met.
        texts: Whitened item texts, float32 [I, D].
        usual: Examples of a client as everybody knows them, where a message states none.
    """

    mode: AuditMode
    surface: str
    histories: Mapping[str, frozenset[int]]
    texts: torch.Tensor
    usual: int
    _aucs: dict[frozenset[str], list[float]] = field(default_factory=dict)
    _hits: dict[str, dict[frozenset[str], list[_Hits]]] = field(default_factory=dict)

    def add(self, view: View, suspects: Suspects) -> None:
        """Attack a view, with every reader of items, and by the suspects."""
        count, met = len(view.members), union(self.histories, view.members)
        scores = suspects.scores(view, count)
        found = auc(scores, suspects.are_in(view))
        self._aucs.setdefault(view.members, []).append(found)
        stated = self.usual * count if view.num_examples is None else view.num_examples
        for reader, of_items in item_scores(view.tensors, self.texts).items():
            taken = read_items(of_items, stated + count)
            hits = len(met.intersection(taken.tolist()))
            guess = len(met) / len(self.texts), len(taken) / len(self.texts)
            found_of = (hits / max(1, len(taken)), hits / len(met), *guess)
            self._hits.setdefault(reader, {}).setdefault(view.members, []).append(found_of)

    def rows(self) -> list[AuditRow]:
        """The figures; of all readers that with the largest F1 of its mean precision and recall."""
        rows = [self._row(MEMBERSHIP, np.array([np.mean(own) for own in self._aucs.values()]))]
        means = {
            reader: np.array([np.mean(hits, axis=0) for hits in by_members.values()])
            for reader, by_members in self._hits.items()
        }
        if means:
            best = max(means, key=lambda reader: _f1(*means[reader].mean(0)[:2]))
            for column, metric in enumerate((PRECISION, RECALL)):
                chance = float(means[best][:, column + 2].mean())
                rows.append(self._row(metric, means[best][:, column], chance, best))
        return rows

    def _row(
        self, metric: str, values: np.ndarray, chance: float = 0.5, reader: str = ""
    ) -> AuditRow:
        figures = asdict(estimate(values, Bootstrap()))
        return AuditRow(
            self.mode.value, self.surface, metric, **figures, chance=chance, reader=reader
        )


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / max(precision + recall, 1e-12)


def adapter_row(mode: AuditMode, scores: Mapping[str, np.ndarray], members: int) -> AuditRow:
    """The AUC of users that trained an adapter against users that did not, by the best score.

    The interval is a percentile bootstrap over the users of both sides.

    Args:
        mode: How the updates of the training were protected.
        scores: Name of a score to float64 [users].
        members: The first so many users have trained.
    """
    labels = np.arange(len(next(iter(scores.values())))) < members
    name = max(scores, key=lambda one: auc(scores[one], labels))
    sides = scores[name][:members], scores[name][members:]
    generator, found = np.random.default_rng(0), []
    for _ in range(Bootstrap().num_resamples):
        drawn = np.concatenate([generator.choice(side, len(side)) for side in sides])
        found.append(auc(drawn, labels))
    low, high = np.quantile(found, (0.025, 0.975)).tolist()
    value = auc(scores[name], labels)
    return AuditRow(mode.value, ADAPTER, MEMBERSHIP, value, low, high, len(labels), reader=name)
