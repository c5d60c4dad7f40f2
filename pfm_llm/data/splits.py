"""The split of interactions into training data and the queries of validation and test.

Every rule cuts each user's history, which is in time order (ties in file order), into a train
prefix, a validation middle and a test suffix. Nothing is random. The rules, for a user with n
events:

- ``leave_last_out``: n >= 3: the last event is the test target, the last but one the validation
  target, the rest train. n < 3: all train, no query.
- ``last_fraction``: n >= 3: the last h events are held out, where h is ``held_out * n`` rounded
  half up, but at least 2 and at most n - 1; the first h // 2 of them are validation, the others
  test. n < 3: all train, no query.
- ``global_temporal``: two cut times for everybody, put so that a share of ``held_out / 2`` of all
  events lies at or after t2, and ``held_out`` at or after t1. Train is t < t1, validation
  t1 <= t < t2, test t >= t2: events that share the time of a cut stay together, on its later
  side. Users who first appear at or after t1 train nothing, and are asked at test alone, once
  they have a history before t2. It needs a clock that users share; see `times.shared_clock`.

With ``keep_ties`` no cut divides a *tie group*: the events of one user that share a timestamp,
such as a basket, and whose order therefore means nothing. ``leave_last_out`` then holds out the
last group for test and the last but one for validation. ``last_fraction`` puts its cuts as above,
and a cut inside a group moves to that group's start: the whole group is on the later side, as in
``global_temporal``, which keeps ties by itself. Where that would leave train, validation or test
without a group, the cut goes to the nearest place where each of them has one. So the held-out
share may differ from ``held_out``. Users with fewer than 3 groups are all train, no query.

At validation a method sees the train history; at test, train and validation.

With ``hold_out_items`` a share of the items is new: they are in no train data and in no history,
and remain targets for those who met them after their cut. They are chosen by a hash of their ids.

Seen items are masked when a catalogue is ranked. A target that the query's history already holds
(possible with ``repeats: allow``) could therefore never be ranked, and a target that comes twice
would be counted twice. Such repeats are dropped from the targets, not from any history, and are
counted in `HeldOut.num_repeated_targets`.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.choices import HeldOutSplit, SplitKind
from pfm_llm.config.data import DataConfig
from pfm_llm.data.history import History, Query
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.times import shared_clock

_MIN_EVENTS = 3
"""One event each for train, validation and test."""


@dataclass(frozen=True)
class TrainData:
    """The data that training may use: no held-out event is reachable from here.

    Attributes:
        interactions: The train events, with the catalogue and the user indexing of the whole.
            Its arrays are copies: the base of a view would hold the held-out events. Users may
            have empty histories.
    """

    interactions: Interactions


@dataclass(frozen=True)
class HeldOut:
    """The queries of one split, one for each user with a history and a target.

    Attributes:
        name: ``"validation"`` or ``"test"``.
        users: Internal user ids, ascending, int64 [Q].
        histories: Per query the items that a method may use, oldest first, int32 [>= 1].
        history_ratings: The ratings of ``histories``, float32, or None without ratings.
        targets: Per query the held-out items to find, oldest first, distinct, none of them in
            the history, int32 [>= 1].
        num_dropped: Number of users without a query: they lack a history or a target.
        num_repeated_targets: Number of held-out events that are no target because their item is
            in the history or among the earlier targets.
        target_ratings: The ratings of ``targets``, float32, or None without ratings. They are
            labels: a method never gets them as input.
    """

    name: str
    users: np.ndarray
    histories: tuple[np.ndarray, ...]
    history_ratings: tuple[np.ndarray, ...] | None
    targets: tuple[np.ndarray, ...]
    num_dropped: int
    num_repeated_targets: int
    target_ratings: tuple[np.ndarray, ...] | None = None

    def take(self, queries: Sequence[int] | np.ndarray) -> "HeldOut":
        """The queries at some positions, in that order; the counts stay those of the whole.

        Args:
            queries: int [K], positions in ``users``.
        """
        fields = ("histories", "history_ratings", "targets", "target_ratings")
        taken: dict[str, Any] = {
            name: tuple(values[query] for query in queries)
            for name in fields
            if (values := getattr(self, name)) is not None
        }
        return replace(self, users=self.users[np.asarray(queries, dtype=np.int64)], **taken)

    def target_rows(self, queries: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the targets of some queries stand among all targets of the split, int64 [T]."""
        starts = np.cumsum([0, *map(len, self.targets)])
        return np.concatenate([np.arange(starts[q], starts[q + 1]) for q in queries])

    def query(self, index: int) -> Query:
        """One query as a value; whether its targets were liked is not in it."""
        ratings = self.history_ratings
        history = History(self.histories[index], None if ratings is None else ratings[index])
        return Query(int(self.users[index]), history, self.targets[index])

    def liked(self, threshold: float) -> tuple[np.ndarray, ...]:
        """Which targets were liked: the labels of the task ``like``.

        Args:
            threshold: ``data.like_threshold``; a rating from here on is a like.

        Returns:
            Per query bool [targets of it], beside ``targets``.

        Raises:
            DataError: There are no ratings, or they are not one for each target.
        """
        if self.target_ratings is None:
            raise DataError(
                f"{self.name}: likes need ratings and the source has none; set "
                "data.columns.rating, or leave the task like out"
            )
        if [*map(len, self.target_ratings)] != [*map(len, self.targets)]:
            raise DataError(
                f"{self.name}: target_ratings are not those of the targets; select queries with "
                "HeldOut.take, which takes every field along"
            )
        return tuple(ratings >= threshold for ratings in self.target_ratings)


@dataclass(frozen=True)
class Split:
    """The three parts of the interactions.

    Attributes:
        train: The data of training.
        validation: Queries to choose settings by; their histories are the train events.
        test: Queries to report; their histories are the train and validation events.
        rule: The rule that divided them, in words.
    """

    train: TrainData
    validation: HeldOut
    test: HeldOut
    rule: str

    def named(self, name: HeldOutSplit) -> HeldOut:
        """The queries of a split."""
        return self.test if name is HeldOutSplit.TEST else self.validation

    def describe(self) -> str:
        """The rule and the counts of each part, in a few lines for a log or a report."""
        train = self.train.interactions
        num_active = int(np.count_nonzero(np.diff(train.offsets)))
        lines = [self.rule, f"train: {len(train.items):,} interactions of {num_active:,} users"]
        for held_out in (self.validation, self.test):
            num_targets = sum(map(len, held_out.targets))
            lines.append(
                f"{held_out.name}: {len(held_out.users):,} users, {num_targets:,} targets "
                f"({held_out.num_dropped:,} users without a query, "
                f"{held_out.num_repeated_targets:,} repeated targets dropped)"
            )
        return "\n".join(lines)


_Cuts = tuple[np.ndarray, np.ndarray, str]
"""Event indices, int64 [num_users], at which train and validation end for each user; the rule."""


def split_interactions(interactions: Interactions, config: DataConfig) -> Split:
    """Divide interactions by the rule ``config.split``; the module describes the rules.

    Args:
        interactions: All events; they are not changed and not shared with the train part.
        config: ``split``, ``held_out`` and ``keep_ties`` are read.

    Returns:
        The three parts. No train event is later than a held-out one of its user.

    Raises:
        ConfigError: ``held_out`` is 0 with a rule that needs it.
        DataError: ``global_temporal`` or ``keep_ties`` without timestamps, or with ones that do
            not serve; or no user has a query at validation or at test.
    """
    if config.split is SplitKind.LEAVE_LAST_OUT:
        cuts = _leave_last_out(interactions)
    elif config.held_out == 0:
        raise ConfigError(
            f"data.held_out: must be above 0 for data.split: {config.split}; "
            "set it, or use data.split: leave_last_out"
        )
    elif config.split is SplitKind.LAST_FRACTION:
        cuts = _last_fraction(interactions, config.held_out)
    else:
        cuts = _global_temporal(interactions, config.held_out)
    if config.keep_ties:
        cuts = _keep_ties(interactions, cuts, config.split)
    train_ends, validation_ends, rule = cuts
    starts, ends = interactions.offsets[:-1], interactions.offsets[1:]
    is_new = new_items(interactions.catalogue, config.hold_out_items)
    if is_new.any():
        rule += f"; {int(is_new.sum()):,} items are in no history (data.hold_out_items)"
    shown = ~is_new[interactions.items]
    validation = (starts, train_ends, validation_ends)
    return Split(
        train=_train_data(interactions, train_ends, shown),
        validation=_held_out("validation", interactions, validation, shown),
        test=_held_out("test", interactions, (starts, validation_ends, ends), shown),
        rule=rule,
    )


def new_items(catalogue: Catalogue, share: float) -> np.ndarray:
    """Which items ``data.hold_out_items`` holds out, bool [I]: those of the smallest id hashes.

    The order of the catalogue does not matter.
    """
    ids = [item.encode() for item in catalogue.item_ids]
    order = sorted(range(len(ids)), key=lambda i: hashlib.blake2b(ids[i], digest_size=8).digest())
    is_new = np.zeros(len(ids), dtype=bool)
    is_new[order[: math.floor(share * len(ids) + 0.5)]] = True
    return is_new


def _order(interactions: Interactions) -> str:
    if interactions.timestamps is None:
        return "in file order, as there are no timestamps"
    return "in time order, ties in file order"


def _leave_last_out(interactions: Interactions) -> _Cuts:
    ends = interactions.offsets[1:]
    divided = np.diff(interactions.offsets) >= _MIN_EVENTS
    return (
        np.where(divided, ends - 2, ends),
        np.where(divided, ends - 1, ends),
        "leave_last_out: each user's last item is the test target, the last but one the "
        f"validation target ({_order(interactions)})",
    )


def _last_fraction(interactions: Interactions, share: float) -> _Cuts:
    ends, lengths = interactions.offsets[1:], np.diff(interactions.offsets)
    num_held_out = np.floor(share * lengths + 0.5).astype(np.int64)
    num_held_out = np.minimum(np.maximum(num_held_out, 2), lengths - 1)
    num_held_out = np.where(lengths >= _MIN_EVENTS, num_held_out, 0)
    train_ends = ends - num_held_out
    return (
        train_ends,
        train_ends + num_held_out // 2,
        f"last_fraction: the last {share:.0%} of each user's items, first half validation, "
        f"second half test ({_order(interactions)})",
    )


def _global_temporal(interactions: Interactions, share: float) -> _Cuts:
    times = shared_clock(interactions.timestamps, interactions.offsets)
    if len(times) < _MIN_EVENTS:
        raise DataError(
            f"data.split: global_temporal needs {_MIN_EVENTS} interactions at least, "
            f"found {len(times)}; use another source"
        )
    ordered = np.sort(times)
    num_test = max(1, math.floor(len(times) * share / 2 + 0.5))
    num_held_out = max(num_test + 1, math.floor(len(times) * share + 0.5))
    first, second = ordered[-num_held_out].item(), ordered[-num_test].item()
    if not ordered[0] < first < second:
        raise DataError(
            "data.split: global_temporal: too many interactions share a timestamp to cut them "
            f"into three (cuts at {first} and {second}, earliest {ordered[0]}); change "
            "data.held_out, or use data.split: leave_last_out or last_fraction"
        )
    starts = interactions.offsets[:-1]
    return (
        starts + _count_per_user(times < first, interactions.offsets),
        starts + _count_per_user(times < second, interactions.offsets),
        f"global_temporal: train before {first}, validation from there to before {second}, "
        "test from there on",
    )


def _keep_ties(interactions: Interactions, cuts: _Cuts, kind: SplitKind) -> _Cuts:
    """The cuts, moved to the starts of tie groups; the module describes the rule."""
    times = interactions.timestamps
    if times is None:
        raise DataError(
            "data.keep_ties needs timestamps and the source has none; set data.columns.timestamp, "
            "or leave data.keep_ties at false"
        )
    if kind is SplitKind.GLOBAL_TEMPORAL:
        return cuts
    train_ends, validation_ends = cuts[0].copy(), cuts[1].copy()
    for user, (start, end) in enumerate(itertools.pairwise(interactions.offsets)):
        # Where a group begins, but for the first one: each is a place for a cut.
        places = start + 1 + np.flatnonzero(np.diff(times[start:end]))
        if len(places) < _MIN_EVENTS - 1:
            train_ends[user] = validation_ends[user] = end
        elif kind is SplitKind.LEAVE_LAST_OUT:
            train_ends[user], validation_ends[user] = places[-2:]
        else:
            last = len(places) - 1
            cut = (cuts[0][user], cuts[1][user])
            first, second = np.searchsorted(places, cut, side="right") - 1
            first = min(max(first, 0), last - 1)
            train_ends[user] = places[first]
            validation_ends[user] = places[max(second, first + 1)]
    rule = f"{cuts[2]}; a user's events of one time lie on one side of each cut (keep_ties)"
    return train_ends, validation_ends, rule


def _count_per_user(events: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The number of each user's events that are true, int64 [num_users]."""
    running = np.concatenate(([0], np.cumsum(events, dtype=np.int64)))
    return running[offsets[1:]] - running[offsets[:-1]]


def _train_data(interactions: Interactions, train_ends: np.ndarray, shown: np.ndarray) -> TrainData:
    lengths = np.diff(interactions.offsets)
    # Indexing with a mask copies, so no held-out event hangs on as the base of a view.
    kept = (np.arange(len(interactions.items)) < np.repeat(train_ends, lengths)) & shown
    train_lengths = _count_per_user(kept, interactions.offsets)
    times, ratings = interactions.timestamps, interactions.ratings
    return TrainData(
        replace(
            interactions,
            offsets=np.concatenate(([0], np.cumsum(train_lengths, dtype=np.int64))),
            items=interactions.items[kept],
            timestamps=None if times is None else times[kept],
            ratings=None if ratings is None else ratings[kept],
        )
    )


def _held_out(
    name: str,
    interactions: Interactions,
    bounds: tuple[np.ndarray, np.ndarray, np.ndarray],
    shown: np.ndarray,
) -> HeldOut:
    """The queries whose history is bounds[0]:bounds[1] and whose targets are bounds[1]:bounds[2].

    Each bound is an event index per user, int64 [num_users]. A history has the events that are
    ``shown``, bool [num_interactions].
    """
    items, ratings = interactions.items, interactions.ratings
    asked: list[tuple[int, np.ndarray, np.ndarray]] = []  # user, events of history and targets
    num_repeated = 0
    for user, (start, middle, end) in enumerate(zip(*bounds, strict=True)):
        past = start + np.flatnonzero(shown[start:middle])
        history, held_out = items[past], items[middle:end]
        if len(history) == 0 or len(held_out) == 0:
            continue
        rankable = _without_repeats(held_out, history)
        num_repeated += len(held_out) - len(rankable)
        if len(rankable) > 0:
            asked.append((user, past, middle + rankable))
    if not asked:
        raise DataError(
            f"no user has a query at {name}: none of {interactions.num_users} has both a history "
            f"and a held-out item (a user needs {_MIN_EVENTS} interactions); use a source with "
            "longer histories, or another data.split"
        )
    # Indexing with arrays copies: no query hangs on to the events of others.
    return HeldOut(
        name=name,
        users=np.array([user for user, _, _ in asked], dtype=np.int64),
        histories=tuple(items[events] for _, events, _ in asked),
        history_ratings=None if ratings is None else tuple(ratings[own] for _, own, _ in asked),
        targets=tuple(items[events] for _, _, events in asked),
        num_dropped=interactions.num_users - len(asked),
        num_repeated_targets=num_repeated,
        target_ratings=None if ratings is None else tuple(ratings[own] for _, _, own in asked),
    )


def _without_repeats(targets: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Positions of the targets that the history lacks, of each item the first; ascending."""
    fresh = np.flatnonzero(~np.isin(targets, history))
    _, first_places = np.unique(targets[fresh], return_index=True)
    return fresh[np.sort(first_places)]
