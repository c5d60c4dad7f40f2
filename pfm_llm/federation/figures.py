"""Figures over the users of all nodes, from sums that each node makes of its own."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pfm_llm.federation.members import Link, ask_members
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.protocol.messages import EvaluateReply, EvaluateRequest
from pfm_llm.protocol.transport import as_sent
from pfm_llm.protocol.types import Mode, SharedState

_log = logging.getLogger(__name__)
_NORMAL_95 = 1.959964
"""Of a normal distribution: 95 % lie within so many standard deviations of the mean."""


@dataclass(frozen=True)
class FederatedFigure:
    """A mean over the users of the nodes that did not withhold theirs.

    Attributes:
        name: A mode, ``popularity``, or a paired difference ``<first>-<second>``.
        metric: Such as ``ndcg``.
        k: Length of the list.
        value: The mean over users.
        ci_low: Lower end of its 95 % interval, by the normal distribution.
        ci_high: Upper end of this interval.
        num_users: Users behind it.
        num_nodes: Nodes behind it.
    """

    name: str
    metric: str
    k: int
    value: float
    ci_low: float
    ci_high: float
    num_users: int
    num_nodes: int


def combine(replies: Iterable[EvaluateReply]) -> list[FederatedFigure]:
    """Means and intervals from the sums of nodes.

    With n users, s the sum and q the sum of squares, the variance is (q - s² / n) / (n - 1).

    Args:
        replies: Those of all nodes; one that withholds its figures has none.
    """
    sums: dict[tuple[str, str, int], list[tuple[float, float, int]]] = {}
    for reply in replies:
        for one in reply.figures:
            own = (one.total, one.squares, one.num_users)
            sums.setdefault((one.name, one.metric, one.k), []).append(own)
    figures = []
    for (name, metric, k), found in sums.items():
        total, squares = (math.fsum(one[i] for one in found) for i in (0, 1))
        count = sum(one[2] for one in found)
        mean = total / count
        variance = max(0.0, squares - total * mean) / max(1, count - 1)
        half = _NORMAL_95 * math.sqrt(variance / count)
        figures.append(
            FederatedFigure(name, metric, k, mean, mean - half, mean + half, count, len(found))
        )
    return figures


def count_items(side: ServerSide, link: Link) -> torch.Tensor | None:
    """The training interactions of each item over the nodes, float64 [I]: what is popular.

    Returns:
        None where every node withholds its counts.
    """
    request = EvaluateRequest(agreement=side.agreement.hash(), round_number=0)
    answers = _ask(side, link, request)
    num_items = len(side.model.model.item_texts)
    counts = [
        answer.tensors["counts"].double()
        for answer in answers.values()
        if "counts" in answer.tensors and answer.tensors["counts"].shape == (num_items,)
    ]
    return torch.stack(counts).sum(0) if counts else None


def evaluate_nodes(
    side: ServerSide,
    link: Link,
    shared: SharedState,
    request: EvaluateRequest,
    counts: torch.Tensor | None = None,
) -> list[FederatedFigure]:
    """Measure a shared state at all nodes.

    Args:
        side: The server's side.
        link: Reaches the nodes.
        shared: The state to measure.
        request: Split, modes, lengths of lists; its other fields are filled in here.
        counts: From `count_items`, to measure popularity beside; None: it is not measured.
    """
    sent = as_sent(shared.tensors, side.model.contract.tensors)
    tensors = {f"shared/{name}": tensor for name, tensor in sent.items()}
    if counts is not None:
        tensors["counts"] = counts
    whole = request.model_copy(
        update={
            "agreement": side.agreement.hash(),
            "round_number": shared.round_number,
            "tensors": tensors,
        }
    )
    return combine(_ask(side, link, whole).values())


def _ask(side: ServerSide, link: Link, request: EvaluateRequest) -> dict[str, EvaluateReply]:
    """The answers of all nodes; who gives none is named in the log."""
    answers = ask_members(side, link, "evaluate", dict.fromkeys(link.nodes, request))
    found = {n: a for n, a in answers.items() if isinstance(a, EvaluateReply)}
    for node in sorted(set(link.nodes) - found.keys()):
        _log.warning("node %s is in no figure: %s", node, answers.get(node, "no answer"))
    return found


def evaluation_of(
    side: ServerSide, split: str, modes: Sequence[Mode], ks: Sequence[int]
) -> EvaluateRequest:
    """The request of an evaluation with the private weight of the config."""
    return EvaluateRequest(
        agreement=side.agreement.hash(),
        round_number=0,
        split=split,
        modes=tuple(modes),
        ks=tuple(ks),
        private_weight=side.config.adapters.private.weight,
    )
