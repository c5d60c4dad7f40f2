"""New items: how the model ranks items that are in no training history."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.data.splits import HeldOut
from pfm_llm.evaluation import ranking
from pfm_llm.evaluation.candidates import PADDING
from pfm_llm.evaluation.evaluator import EvaluationTask, Measured
from pfm_llm.evaluation.metrics import ndcg, per_user
from pfm_llm.evaluation.new_places import NewPlaces
from pfm_llm.evaluation.personality.estimates import (
    Bootstrap,
    Estimate,
    estimate,
    paired_difference,
)
from pfm_llm.evaluation.personality.new_items import new_item_figures, percentiles, top_share
from pfm_llm.evaluation.ranking import Ranks
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import measure, only
from pfm_llm.runs.run import Run
from pfm_llm.runs.study.others import with_histories

_TOP = 10


def new_items(
    run: Run, task: EvaluationTask, measured: Measured, bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Every figure on new items; empty where no target is one.

    ``new_items_percentile`` is among all items that the user has not met, and
    ``new_items_among_new`` among the new ones; see `personality.new_items`. Each comes with the
    private part, without it (``_shared``), and for the cosine of a text with the mean text of the
    history, which nothing has trained (``_cosine``). ``new_items_over_stranger`` is what is lost
    among the new items when the user is taken for another one, history and private part alike.
    ``new_items_in_top_ten`` and ``new_items_in_targets`` are the shares of new items in both, and
    ``new_items_in_top_ten_shown`` in the top ten under `NewPlaces`. ``new_items_shown_ndcg`` is
    what that rule changes in the NDCG of a list of ten, over all targets.

    Args:
        run: The run.
        task: The queries, with both modes.
        measured: Their ranks.
        bootstrap: The settings of the intervals.
    """
    train, held_out = run.data.split.train.interactions, task.held_out
    is_new = np.ones(len(train.catalogue), dtype=bool)
    is_new[train.items] = False
    targets = np.concatenate(held_out.targets)
    chosen = is_new[targets]
    if not chosen.any():
        return {}
    own, shared = (measured.ranks[mode] for mode in (Mode.SHARED_PRIVATE, Mode.SHARED_ONLY))
    whole = _candidates(held_out, len(is_new))
    figures = new_item_figures(own.full, shared.full, own.users, whole, chosen, bootstrap)
    among = _other_new(held_out, is_new)
    against_new = dataclasses.replace(task, negatives=among, liked=None)
    both = only(against_new, Mode.SHARED_PRIVATE, Mode.SHARED_ONLY, depth=_TOP)
    ranks = measure(run, both).ranks
    figures |= _places(run, against_new, (measured.ranks, ranks), is_new, bootstrap)
    num_new, places = _shown(ranks[Mode.SHARED_PRIVATE], held_out, is_new)
    top = ranks[Mode.SHARED_PRIVATE].lists
    assert top is not None
    per_target = {
        "in_top_ten": top_share(top, is_new),
        "in_top_ten_shown": num_new / top.shape[1],
        "in_targets": chosen.astype(np.float64),
        "shown_ndcg": ndcg(places, _TOP) - ndcg(own.full, _TOP),
    }
    return figures | {
        f"new_items_{name}": estimate(per_user(values, own.users)[0], bootstrap)
        for name, values in per_target.items()
    }


def _shown(ranks: Ranks, held_out: HeldOut, is_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Under `NewPlaces`, the number of new items in each list and the place of each target.

    Args:
        ranks: Of the targets, with lists; the sampled ones are among the other new items.
        held_out: The queries.
        is_new: bool [I].

    Returns:
        Two arrays int64 [T]. A target that is not shown has place 11.
    """
    assert ranks.lists is not None
    rule, chosen = NewPlaces(), is_new[np.concatenate(held_out.targets)]
    lengths = [len(targets) for targets in held_out.targets]
    left = [int(is_new.sum() - is_new[np.unique(own)].sum()) for own in held_out.histories]
    plain = (is_new[ranks.lists] & (ranks.lists != PADDING)).sum(1)
    candidates = _candidates(held_out, len(is_new))
    shown = rule.shown(plain, np.repeat(left, lengths), candidates, _TOP)
    # The user's other targets are not among the negatives; those that are new stand above too.
    ends = np.cumsum(lengths)
    above = [
        (chosen[own] & (ranks.full[own] <= ranks.full[own][:, None])).sum(1) - chosen[own]
        for own in map(slice, ends - lengths, ends)
    ]
    of_new = ranks.sampled + np.concatenate(above)
    return shown, rule.ranks(ranks.full, of_new, chosen, shown, _TOP)


def _places(
    run: Run,
    against_new: EvaluationTask,
    found: tuple[Mapping[Mode, Ranks], Mapping[Mode, Ranks]],
    is_new: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    """How far up new targets stand, among all items and among the new ones.

    Args:
        run: The run.
        against_new: The task whose negatives are the other new items.
        found: Ranks among all items, and of ``against_new``.
        is_new: bool [I].
        bootstrap: The settings of the intervals.
    """
    held_out, among = against_new.held_out, against_new.negatives
    chosen, (of_task, ranks) = is_new[np.concatenate(held_out.targets)], found
    few, whole = (among != PADDING).sum(1) + 1, _candidates(held_out, len(is_new))
    cosine = _cosine(run, held_out, among)
    kinds = {
        "": (of_task[Mode.SHARED_PRIVATE], ranks[Mode.SHARED_PRIVATE]),
        "_shared": (of_task[Mode.SHARED_ONLY], ranks[Mode.SHARED_ONLY]),
        "_cosine": (cosine, cosine),
    }

    def placed(found: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        return percentiles(found[chosen], candidates[chosen], cosine.users[chosen])

    figures = {}
    for kind, (of_all, of_new) in kinds.items():
        figures[f"new_items_percentile{kind}"] = estimate(placed(of_all.full, whole), bootstrap)
        figures[f"new_items_among_new{kind}"] = estimate(placed(of_new.sampled, few), bootstrap)
    if len(held_out.users) > 1:
        own, strange = ranks[Mode.SHARED_PRIVATE], _by_strangers(run, against_new)
        figures["new_items_over_stranger"] = paired_difference(
            placed(own.sampled, few), placed(strange.sampled, few), bootstrap
        )
    return figures


def _candidates(held_out: HeldOut, num_items: int) -> np.ndarray:
    """Per target the number of items that its user has not met."""
    left = [num_items - len(np.unique(history)) for history in held_out.histories]
    return np.repeat(left, [len(targets) for targets in held_out.targets])


def _other_new(held_out: HeldOut, is_new: np.ndarray) -> np.ndarray:
    """Per target the new items that its user neither has met nor is asked for, padded."""
    rows = []
    for history, targets in zip(held_out.histories, held_out.targets, strict=True):
        others = is_new.copy()
        others[history] = others[targets] = False
        rows += [np.flatnonzero(others)] * len(targets)
    found = np.full((len(rows), max(map(len, rows))), PADDING, dtype=np.int32)
    for row, items in zip(found, rows, strict=True):
        row[: len(items)] = items
    return found


def _cosine(run: Run, held_out: HeldOut, among: np.ndarray) -> Ranks:
    """Ranks by the cosine of each item's text with the mean of those of the history."""
    texts = F.normalize(run.model.model.item_texts.cpu(), dim=1)

    def score(queries: Sequence[int]) -> np.ndarray:
        histories = (torch.from_numpy(held_out.histories[query]).long() for query in queries)
        means = torch.stack([texts[history].mean(0) for history in histories])
        found: np.ndarray = (F.normalize(means, dim=1) @ texts.T).numpy()
        return found

    return ranking.rank_all(score, held_out, among)


def _by_strangers(run: Run, task: EvaluationTask) -> Ranks:
    """Ranks of each user's targets for the history of another user."""
    held_out, train = task.held_out, run.data.split.train.interactions
    generator = numpy_generator(run.config.seed, "new items of strangers")
    lender, kept = _lenders(held_out, generator.permutation(len(held_out.users)))
    rated = held_out.history_ratings
    swapped = dataclasses.replace(
        held_out,
        histories=_picked(held_out.histories, lender, kept),
        history_ratings=None if rated is None else _picked(rated, lender, kept),
    )
    lengths = np.zeros(train.num_users, dtype=np.int64)
    lengths[held_out.users] = [len(history) for history in swapped.histories]
    ratings = swapped.history_ratings
    histories = dataclasses.replace(
        train,
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        items=np.concatenate(swapped.histories),
        timestamps=None,
        ratings=None if ratings is None else np.concatenate(ratings),
    )
    with with_histories(run, histories) as other:
        asked = only(task, Mode.SHARED_PRIVATE, held_out=swapped)
        return measure(other, asked).ranks[Mode.SHARED_PRIVATE]


def _lenders(held_out: HeldOut, order: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """For each user another one, and which items of that one's history are kept, bool each.

    It is the one before in the order of whose history something is left: what a user is asked for
    must be no item of it, or it would be masked. Where nobody has such a history, it is the user.

    Args:
        held_out: The queries.
        order: int [U], a permutation of the users.
    """
    lender, kept = np.empty_like(order), [np.empty(0, bool)] * len(order)
    for place, user in enumerate(order.tolist()):
        for step in range(1, len(order) + 1):
            other = order[place - step]
            left = ~np.isin(held_out.histories[other], held_out.targets[user])
            if left.any():
                break
        lender[user], kept[user] = other, left
    return lender, kept


def _picked(
    values: Sequence[np.ndarray], lender: np.ndarray, kept: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    return tuple(values[other][mask] for other, mask in zip(lender, kept, strict=True))
