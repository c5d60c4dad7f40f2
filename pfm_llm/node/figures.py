"""The figures of a node: sums over its users, withheld where there are too few of them."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pfm_llm.base.errors import NodeRefused
from pfm_llm.config.choices import HeldOutSplit
from pfm_llm.config.cut_offs import RANK_LABELS
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import evaluator, metrics, ranking
from pfm_llm.evaluation.evaluator import EvaluationTask
from pfm_llm.node.membership import Membership
from pfm_llm.node.slots import Left
from pfm_llm.protocol.messages import EvaluateReply, EvaluateRequest, Figure
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import measure

POPULARITY = "popularity"
COUNTS, SHARED = "counts", "shared/"


def counts_of(member: Membership, left: Left, fewest: int) -> EvaluateReply:
    """How often each item was met in the training data of the node.

    Args:
        member: The federation.
        left: The clients that take part in nothing.
        fewest: Over fewer users the counts are withheld.
    """
    train = member.run.data.split.train.interactions
    everybody = _present(member, left, range(train.num_users))
    users = [user for user in everybody if len(train.history(user))]
    if len(users) < fewest:
        return EvaluateReply()
    items = np.concatenate([train.history(user) for user in users])
    counts = np.bincount(items, minlength=len(train.catalogue)).astype(np.float64)
    return EvaluateReply(num_users=len(users), tensors={COUNTS: torch.from_numpy(counts)})


def figures_of(
    member: Membership, left: Left, request: EvaluateRequest, fewest: int, most: int | None
) -> EvaluateReply:
    """Sums of each metric over the node's users, and of paired differences.

    Args:
        member: The federation.
        left: The clients that take part in nothing.
        request: What to measure.
        fewest: Over fewer users all figures are withheld.
        most: Measure a fixed random sample of at most so many users; None: all. It is the owner's
            choice: the figures of two samples could differ by one user.

    Raises:
        NodeRefused: The tensors are not those of the contract, or the counts are not one an item.
    """
    named = {n.removeprefix(SHARED): t for n, t in request.tensors.items() if n.startswith(SHARED)}
    shared, run = member.shared(named, request.round_number), member.run
    held_out = _queries(member, left, request, most)
    if len(held_out.users) < fewest:
        return EvaluateReply()
    modes = request.modes
    if not run.config.adapters.private.enabled:
        modes = tuple(mode for mode in modes if mode in (Mode.ZERO_SHOT, Mode.SHARED_ONLY))
    task = EvaluationTask(
        held_out=held_out,
        # Sampled negatives are for comparisons with papers; nodes measure the full catalogue alone.
        negatives=np.zeros((sum(map(len, held_out.targets)), 0), np.int32),
        shared=shared,
        parts=evaluator.parts_of(modes, request.private_weight),
    )
    ranks = {mode.value: found for mode, found in measure(run, task).ranks.items()}
    if COUNTS in request.tensors:
        counts = _checked(request.tensors[COUNTS], len(run.data.interactions.catalogue))
        ranks[POPULARITY] = ranking.rank_all(
            lambda queries: np.tile(counts, (len(queries), 1)), held_out, task.negatives
        )
    figures = [
        figure
        for metric in RANK_LABELS
        for k in dict.fromkeys(request.ks)
        for figure in _figures(ranks, metric, k)
    ]
    return EvaluateReply(figures=tuple(figures), num_users=len(held_out.users))


def _figures(ranks: Mapping[str, ranking.Ranks], metric: str, k: int) -> list[Figure]:
    """The sums of a metric by mode, and of the difference of each pair of modes."""
    own = {
        name: metrics.per_user(metrics.RANK_METRICS[metric](found.full, k), found.users)[0]
        for name, found in ranks.items()
    }
    pairs = [
        (first, second)
        for first, second in (
            (Mode.SHARED_PRIVATE.value, Mode.SHARED_ONLY.value),
            *((mode, POPULARITY) for mode in own if mode != POPULARITY),
        )
        if first in own and second in own
    ]
    own |= {f"{first}-{second}": own[first] - own[second] for first, second in pairs}
    return [
        Figure(
            name=name,
            metric=metric,
            k=k,
            total=float(values.sum()),
            squares=float(np.square(values).sum()),
            num_users=len(values),
        )
        for name, values in own.items()
    ]


def _queries(member: Membership, left: Left, request: EvaluateRequest, most: int | None) -> HeldOut:
    held_out = member.run.data.split.named(HeldOutSplit(request.split))
    users = set(_present(member, left, held_out.users.tolist()))
    kept = held_out.take([q for q, user in enumerate(held_out.users.tolist()) if user in users])
    return evaluator.sample_users(kept, most, member.config.seed)


def _present(member: Membership, left: Left, users: Sequence[int]) -> list[int]:
    """The users whose clients have not left."""
    client_of = member.run.clients.histories.client_of
    is_gone = functools.cache(left.__contains__)
    return [user for user in users if not is_gone(client_of(user))]


def _checked(counts: torch.Tensor, num_items: int) -> np.ndarray:
    if counts.shape != (num_items,) or not bool(counts.isfinite().all()):
        raise NodeRefused(NodeRefusal.MALFORMED, "the counts are not one finite number an item")
    return counts.to(torch.float32).numpy()
