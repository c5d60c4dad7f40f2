"""From scores to ranks and recommended items.

Rank 1 is best. Ties and scores that are not a number count against the target. A scorer that gives
all items the same score, or NaN, therefore ranks every target last.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pfm_llm.base.errors import DataError

Scores = npt.NDArray[np.floating] | torch.Tensor
ItemArray = npt.NDArray[np.integer]
Ranks = npt.NDArray[np.int64]

_COMPARED_AT_ONCE = 1 << 24
"""Bound on the number of comparisons that are in memory at once."""

_SCORES_AT_ONCE = 1 << 26


def full_ranks(
    scores: Scores, histories: Sequence[ItemArray], targets: Sequence[ItemArray]
) -> Ranks:
    """Rank every target among the full catalogue.

    The rank is one more than the number of *other* candidates whose score is not below the
    target's. Candidates are all items that the query has not seen; a query's other targets
    stay among them.

    Args:
        scores: [queries, items], any float dtype; higher is better.
        histories: Per query the items already seen, which are no candidates; repeated items
            are fine.
        targets: Per query the item ids to rank.

    Returns:
        int64 [total targets], from 1, in the order of ``targets``, query by query.

    Raises:
        DataError: Lengths differ, an item id is outside the catalogue, or a target is in its
            own history.
    """
    matrix = _as_matrix(scores, len(targets))
    if len(histories) != len(targets):
        raise DataError(f"{len(histories)} histories for {len(targets)} queries: give one each")
    ranks = [np.zeros(0, np.int64)]
    for query, (row, seen, wanted) in enumerate(zip(matrix, histories, targets, strict=True)):
        check_ids(wanted, len(row), "target")
        unseen = _unseen(row, seen)
        masked = wanted[~unseen[wanted]]
        if masked.size:
            raise DataError(
                f"query {query}: target item {masked[0]} is in its own history, which is masked; "
                "leave such repeats out of the targets"
            )
        candidates = row[unseen]
        for some in _blocks(len(wanted), len(candidates)):
            # "Not below" also catches NaN on either side; the target itself supplies the 1.
            below = candidates < row[wanted[some]][:, None]
            ranks.append(np.count_nonzero(~below, axis=1))
    return np.concatenate(ranks)


def sampled_ranks(scores: Scores, targets: Sequence[ItemArray], negatives: ItemArray) -> Ranks:
    """Rank every target among itself and its own sampled negatives.

    Args:
        scores: [queries, items], any float dtype; higher is better.
        targets: Per query the item ids to rank.
        negatives: [total targets, negatives], item ids; -1 is padding and is ignored. Rows are
            in the order of ``targets``, query by query.

    Returns:
        int64 [total targets], from 1, in the order of ``negatives``.

    Raises:
        DataError: Lengths differ, an item id is outside the catalogue, or a target is among
            its own negatives.
    """
    matrix = _as_matrix(scores, len(targets))
    flat = np.concatenate([np.zeros(0, np.int64), *targets])
    if negatives.ndim != 2 or len(negatives) != len(flat):
        raise DataError(
            f"negatives have shape {negatives.shape}, expected one row for each of the "
            f"{len(flat)} targets"
        )
    check_ids(flat, matrix.shape[1], "target")
    check_ids(negatives, matrix.shape[1], "negative", lowest=-1)
    if (negatives == flat[:, None]).any():
        raise DataError("a target is among its own negatives: sample them without the targets")
    queries = np.repeat(np.arange(len(matrix)), [len(wanted) for wanted in targets])[:, None]
    ranks = np.ones(len(flat), np.int64)
    for some in _blocks(*negatives.shape):
        rows, others = queries[some], negatives[some]
        below = matrix[rows, others] < matrix[rows, flat[some, None]]
        ranks[some] += np.count_nonzero(~below & (others >= 0), axis=1)
    return ranks


def top_items(
    scores: Scores, seen: ItemArray, n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
    """The best unseen items, best first; ties go to the lower item id.

    Args:
        scores: [items], any float dtype. An item whose score is NaN is never recommended.
        seen: Item ids to leave out.
        n: How many items, at least 0.

    Returns:
        Item ids (int64) and their scores, each [min(n, items that are left)].

    Raises:
        DataError: ``n`` is negative, or an item id is outside the catalogue.
    """
    row = _as_matrix(scores[None, :], 1)[0]
    if n < 0:
        raise DataError(f"cannot recommend {n} items: ask for 0 or more")
    candidates = np.flatnonzero(_unseen(row, seen) & ~np.isnan(row))
    order = np.argsort(-row[candidates], kind="stable")[:n]
    best = candidates[order]
    return best, row[best]


def queries_at_once(num_items: int, most: int) -> int:
    """How many queries are scored together, so that their scores stay below 256 MB in float32.

    Args:
        num_items: Size of the catalogue.
        most: An upper bound, which holds for catalogues of up to 2^26 / ``most`` items.
    """
    return max(1, min(most, _SCORES_AT_ONCE // max(1, num_items)))


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Blocks of rows of a matrix, each with at most `_COMPARED_AT_ONCE` entries or one row."""
    size = max(1, _COMPARED_AT_ONCE // max(1, num_columns))
    return (slice(start, start + size) for start in range(0, num_rows, size))


def lists_around(
    scores: Scores,
    histories: Sequence[ItemArray],
    targets: Sequence[ItemArray],
    ranks: Ranks,
    depth: int,
) -> npt.NDArray[np.int32]:
    """The list of each target: the other candidates, the best first, and the target at its rank.

    A tie counts against each target of a query, so each target has a list of its own.

    Args:
        scores: See `full_ranks`.
        histories: See `full_ranks`.
        targets: See `full_ranks`.
        ranks: From `full_ranks`.
        depth: Length of a list, at least 1.

    Returns:
        int32 [total targets, depth], item ids; -1 where the candidates do not fill a list.

    Raises:
        DataError: An item id is outside the catalogue.
    """
    lists = np.full((len(ranks), depth), -1, np.int32)
    rows = iter(range(len(ranks)))
    matrix = _as_matrix(scores, len(targets))
    for row, seen, wanted in zip(matrix, histories, targets, strict=True):
        # As in the ranks, a score that is not a number stands above the target.
        best, _ = top_items(np.where(np.isnan(row), np.inf, row), seen, depth + 1)
        for target, place in zip(wanted, rows, strict=False):
            own = best[best != target]
            if ranks[place] <= depth:
                own = np.insert(own, ranks[place] - 1, target)
            lists[place, : len(own[:depth])] = own[:depth]
    return lists


def _unseen(row: npt.NDArray[np.floating], seen: ItemArray) -> npt.NDArray[np.bool_]:
    check_ids(seen, len(row), "history")
    unseen = np.ones(len(row), np.bool_)
    unseen[np.asarray(seen, np.int64)] = False
    return unseen


def _as_matrix(scores: Scores, num_queries: int) -> npt.NDArray[np.floating]:
    if isinstance(scores, torch.Tensor):
        # numpy knows no bfloat16; float32 holds every bfloat16 and float16 exactly.
        tensor = scores.detach().cpu()
        scores = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
    if scores.ndim != 2 or len(scores) != num_queries:
        raise DataError(
            f"scores have shape {tuple(scores.shape)}, expected [{num_queries} queries, items]"
        )
    return scores


def check_ids(ids: ItemArray, num_items: int, what: str, lowest: int = 0) -> None:
    """Check that item ids are in the catalogue.

    Args:
        ids: Item ids, of any shape.
        num_items: Size of the catalogue.
        what: The kind of item, for the message, such as ``target``.
        lowest: The lowest valid id; -1 where padding is valid.

    Raises:
        DataError: An id is below ``lowest`` or not below ``num_items``.
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < lowest or ids.max() >= num_items):
        bad = ids.min() if ids.min() < lowest else ids.max()
        raise DataError(
            f"{what} item {bad} is outside the catalogue of {num_items} items; take scores, "
            "histories and targets from one catalogue"
        )
