"""Tests of pfm_llm.data.splits."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.choices import SplitKind
from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.splits import HeldOut, TrainData, new_items, split_interactions
from tests.unit.data.split_cases import (
    FIRST_ITEM,
    FRACTION,
    KINDS,
    LAST_OUT,
    SHARES,
    coded_interactions,
    make,
    queries,
    train_histories,
    try_split,
)

TEMPORAL = DataConfig(split=SplitKind.GLOBAL_TEMPORAL, held_out=0.4)


def reachable_arrays(thing: Any) -> Iterator[np.ndarray]:
    """Every array in an object graph: dataclass fields, attributes, containers, view bases."""
    if isinstance(thing, np.ndarray):
        yield thing
        if thing.base is not None:
            yield from reachable_arrays(thing.base)
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from reachable_arrays(key)
            yield from reachable_arrays(value)
    elif isinstance(thing, tuple | list | set | frozenset):
        for value in thing:
            yield from reachable_arrays(value)
    elif hasattr(thing, "__dict__"):
        yield from reachable_arrays(vars(thing))


def leaked_values(train: TrainData, whole: Interactions, held_out: np.ndarray) -> set[float]:
    """What is in arrays reachable from ``train`` and belongs to held-out events (a mask) alone."""
    secrets: set[float] = set()
    for column in (whole.items, whole.timestamps, whole.ratings):
        if column is not None:  # a time that a train event shares is no secret
            secrets |= set(column[held_out].tolist()) - set(column[~held_out].tolist())
    return secrets & {v for array in reachable_arrays(train) for v in array.ravel().tolist()}


# --- properties of every rule


@given(coded_interactions(), KINDS, SHARES, st.booleans())
def test_parts_make_up_each_history_in_order(
    interactions: Interactions, kind: SplitKind, share: float, keep_ties: bool
) -> None:
    """Train + validation + test is the user's history, event for event, in its order."""
    split = try_split(interactions, kind, share, keep_ties)
    validation, test = queries(split.validation), queries(split.test)
    for user, train in enumerate(train_histories(split)):
        whole = interactions.history(user).tolist()
        if user in validation:
            assert validation[user][0] == train
        if user in test:
            history, targets = test[user]
            assert history + targets == whole
            assert history[: len(train)] == train
            if user in validation:
                assert history[len(train) :] == validation[user][1]
        elif user in validation:
            assert train + validation[user][1] == whole
        elif kind is not SplitKind.GLOBAL_TEMPORAL:
            assert train == whole
        else:
            assert train in (whole, [])


@given(coded_interactions(), KINDS, SHARES, st.booleans())
def test_nothing_held_out_is_reachable_from_train(
    interactions: Interactions, kind: SplitKind, share: float, keep_ties: bool
) -> None:
    """No array hanging on split.train, views' bases included, has a held-out event's values."""
    split = try_split(interactions, kind, share, keep_ties)
    held_out = ~np.isin(interactions.items, split.train.interactions.items)
    assert held_out.any(), "a split that holds nothing out would make this test hollow"
    assert leaked_values(split.train, interactions, held_out) == set()
    targets = np.concatenate([*split.validation.targets, *split.test.targets])
    assert set(targets.tolist()) <= set(interactions.items[held_out].tolist())


def test_search_for_leaks_finds_a_view() -> None:
    """The search above sees through a train part whose arrays are views of the whole."""
    whole = make([[100, 101, 102, 103]], [[5, 6, 7, 8]], ratings=True)
    split = split_interactions(whole, LAST_OUT)
    held_out = np.array([False, False, True, True])
    assert leaked_values(split.train, whole, held_out) == set()
    view = dataclasses.replace(split.train.interactions, items=whole.items[:2])
    assert leaked_values(TrainData(view), whole, held_out) == {102, 103}


@given(coded_interactions(), KINDS, SHARES)
def test_train_keeps_catalogue_users_times_and_ratings(
    interactions: Interactions, kind: SplitKind, share: float
) -> None:
    """Train events carry their own time and rating; users and catalogue keep their index."""
    train = try_split(interactions, kind, share).train.interactions
    assert train.catalogue is interactions.catalogue
    assert train.user_ids == interactions.user_ids
    events = train.items - FIRST_ITEM  # the item's code is the event's index
    np.testing.assert_array_equal(train.timestamps, interactions.timestamps[events])
    np.testing.assert_array_equal(train.ratings, events + 0.5)


@given(coded_interactions(), KINDS, SHARES, st.booleans())
def test_queries_are_well_formed(
    interactions: Interactions, kind: SplitKind, share: float, keep_ties: bool
) -> None:
    """Ascending users, nothing empty, ratings beside the history, everybody accounted for."""
    split = try_split(interactions, kind, share, keep_ties)
    for held_out in (split.validation, split.test):
        assert np.all(np.diff(held_out.users) > 0)
        assert held_out.users.dtype == np.int64
        assert len(held_out.users) + held_out.num_dropped == interactions.num_users
        assert held_out.num_repeated_targets == 0
        assert held_out.history_ratings is not None
        for history, ratings, targets in zip(
            held_out.histories, held_out.history_ratings, held_out.targets, strict=True
        ):
            assert len(history) > 0 < len(targets)
            assert history.dtype == targets.dtype == np.int32
            np.testing.assert_array_equal(ratings, history - FIRST_ITEM + 0.5)
        assert held_out.target_ratings is not None
        for targets, ratings in zip(held_out.targets, held_out.target_ratings, strict=True):
            assert ratings.dtype == np.float32
            np.testing.assert_array_equal(ratings, targets - FIRST_ITEM + 0.5)


@given(coded_interactions(), KINDS, SHARES)
def test_splitting_is_deterministic_and_shares_no_memory(
    interactions: Interactions, kind: SplitKind, share: float
) -> None:
    """Twice the same result, of arrays that are nobody else's."""
    first = try_split(interactions, kind, share)
    second = try_split(interactions, kind, share)
    assert train_histories(first) == train_histories(second)
    assert queries(first.test) == queries(second.test)
    whole = list(reachable_arrays(interactions))
    train = list(reachable_arrays(first.train))
    held_out = [*reachable_arrays(first.validation), *reachable_arrays(first.test)]
    assert not any(np.shares_memory(a, b) for a in whole for b in [*train, *held_out])
    assert not any(np.shares_memory(a, b) for a in train for b in held_out)


# --- leave_last_out


def test_leave_last_out_takes_the_last_two() -> None:
    split = split_interactions(make([[4, 3, 2, 1], [5, 6, 7]]), LAST_OUT)
    assert train_histories(split) == [[4, 3], [5]]
    assert queries(split.validation) == {0: ([4, 3], [2]), 1: ([5], [6])}
    assert queries(split.test) == {0: ([4, 3, 2], [1]), 1: ([5, 6], [7])}
    assert split.validation.history_ratings is None


def test_leave_last_out_keeps_short_users_in_train() -> None:
    """Users of 0, 1 and 2 events are train only and are not asked."""
    split = split_interactions(make([[], [1], [2, 3], [4, 5, 6]]), LAST_OUT)
    assert train_histories(split) == [[], [1], [2, 3], [4]]
    assert split.validation.users.tolist() == split.test.users.tolist() == [3]
    assert split.validation.num_dropped == split.test.num_dropped == 3


def test_ties_keep_the_order_of_the_file() -> None:
    """All in one second: the last of the file is the test target, whatever its item id."""
    split = split_interactions(make([[9, 2, 7]], [[5, 5, 5]]), LAST_OUT)
    assert queries(split.test) == {0: ([9, 2], [7])}


# --- last_fraction


@pytest.mark.parametrize(
    ("num_events", "share", "num_validation", "num_test"),
    [
        (1, 0.2, 0, 0),  # too short
        (2, 0.9, 0, 0),  # too short
        (3, 0.2, 1, 1),  # round(0.6) = 1, raised to 2
        (3, 0.9, 1, 1),  # round(2.7) = 3, lowered to n - 1 = 2
        (10, 0.2, 1, 1),  # round(2.0) = 2
        (10, 0.25, 1, 2),  # round half up(2.5) = 3: the odd one goes to test
        (20, 0.2, 2, 2),  # round(4.0) = 4
        (22, 0.2, 2, 2),  # round(4.4) = 4
        (23, 0.2, 2, 3),  # round(4.6) = 5
    ],
)
def test_last_fraction_counts(
    num_events: int, share: float, num_validation: int, num_test: int
) -> None:
    companion = [0, 1, 2, 3]  # so that somebody can be asked
    whole = make([list(range(num_events)), companion])
    config = DataConfig(split=SplitKind.LAST_FRACTION, held_out=share)
    split = split_interactions(whole, config)
    num_train = num_events - num_validation - num_test
    assert train_histories(split)[0] == list(range(num_train))
    validation, test = queries(split.validation), queries(split.test)
    assert len(validation.get(0, ([], []))[1]) == num_validation
    assert len(test.get(0, ([], []))[1]) == num_test


def test_targets_stay_oldest_first() -> None:
    """last_fraction 0.5 of 8 holds out 4; item ids descend while time ascends."""
    config = DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.5)
    split = split_interactions(make([[1, 2, 3, 9, 8, 7, 6, 5]]), config)
    assert queries(split.validation) == {0: ([1, 2, 3, 9], [8, 7])}
    assert queries(split.test) == {0: ([1, 2, 3, 9, 8, 7], [6, 5])}


@given(coded_interactions(), st.sampled_from([LAST_OUT, FRACTION]))
def test_rules_per_user_leave_nobody_without_train(
    interactions: Interactions, config: DataConfig
) -> None:
    split = try_split(interactions, config.split, config.held_out)
    had_events = np.diff(interactions.offsets) > 0
    has_train = np.diff(split.train.interactions.offsets) > 0
    np.testing.assert_array_equal(has_train, had_events)


# --- global_temporal


def test_global_temporal_cuts_at_shares_of_all_events() -> None:
    """Ten events at times 1..10, share 0.4: t1 = 7 (four at or after), t2 = 9 (two)."""
    whole = make([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]], [[1, 3, 5, 7, 9], [2, 4, 6, 8, 10]])
    split = split_interactions(whole, TEMPORAL)
    assert train_histories(split) == [[1, 2, 3], [6, 7, 8]]
    assert queries(split.validation) == {0: ([1, 2, 3], [4]), 1: ([6, 7, 8], [9])}
    assert queries(split.test) == {0: ([1, 2, 3, 4], [5]), 1: ([6, 7, 8, 9], [0])}
    assert "before 7" in split.rule
    assert "before 9" in split.rule


def test_global_temporal_keeps_ties_together() -> None:
    """Share 0.4 of ten events: t1 is the fourth time from the end, t2 the second.

    Of 1 2 3 4 5 6 8 8 8 9 both are 8, so validation would be empty. Of 1 2 3 4 7 8 8 9 9 9 they
    would be 8 and 9: the 8s are validation and all three 9s test.
    """
    items = [list(range(10))]
    with pytest.raises(DataError, match="share a timestamp"):
        split_interactions(make(items, [[1, 2, 3, 4, 5, 6, 8, 8, 8, 9]]), TEMPORAL)
    split = split_interactions(make(items, [[1, 2, 3, 4, 7, 8, 8, 9, 9, 9]]), TEMPORAL)
    assert train_histories(split) == [[0, 1, 2, 3, 4]]
    assert queries(split.validation)[0][1] == [5, 6]
    assert queries(split.test)[0][1] == [7, 8, 9]


@given(coded_interactions(), SHARES)
def test_global_temporal_divides_by_time_alone(interactions: Interactions, share: float) -> None:
    """Every train time is before every validation time, and those before every test time."""
    split = try_split(interactions, SplitKind.GLOBAL_TEMPORAL, share)
    times = dict(zip(interactions.items.tolist(), interactions.timestamps.tolist(), strict=True))

    def of(held_out: HeldOut) -> list[int]:
        return [times[int(item)] for targets in held_out.targets for item in targets]

    train = [times[int(item)] for item in split.train.interactions.items]
    assert max(train) < min(of(split.validation)) <= max(of(split.validation))
    assert max(of(split.validation)) < min(of(split.test))


def test_global_temporal_asks_newcomers_only_once_they_have_a_history() -> None:
    """User 1 begins at t1 = 7: no validation query, but a test query (t2 = 9)."""
    whole = make([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]], [[1, 2, 3, 4, 5, 6, 8, 9], [7, 10]])
    split = split_interactions(whole, TEMPORAL)
    assert split.validation.users.tolist() == [0]
    assert split.validation.num_dropped == 1
    assert queries(split.test)[1] == ([8], [9])
    assert train_histories(split)[1] == []


def test_global_temporal_holds_out_one_event_each_at_least() -> None:
    """Share 0.2 of three events rounds to one held out in all, and is raised to two."""
    config = DataConfig(split=SplitKind.GLOBAL_TEMPORAL, held_out=0.2)
    split = split_interactions(make([[1, 2, 3]], [[1, 2, 3]]), config)
    assert queries(split.test) == {0: ([1, 2], [3])}
    assert queries(split.validation) == {0: ([1], [2])}


def test_global_temporal_without_anything_before_its_first_cut_is_an_error() -> None:
    """Share 0.4 of 5 5 5 9: one event is test (9), t1 is 5, and no time is before it."""
    with pytest.raises(DataError, match="share a timestamp"):
        split_interactions(make([[1, 2, 3, 4]], [[5, 5, 5, 9]]), TEMPORAL)


def test_global_temporal_refuses_an_order_that_is_no_clock() -> None:
    histories = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 1]]
    positions = [[0, 1, 2, 3], [0, 1, 2], [0, 2, 3]]  # one was left out
    with pytest.raises(DataError, match=r"2 of 3 users begin at 0 and count on by one; name a col"):
        split_interactions(make(histories, positions), TEMPORAL)
    for split in (LAST_OUT, FRACTION):
        split_interactions(make(histories, positions), split)
    days = [[0, 1, 2, 3], [0, 4, 7], [1, 2, 3]]
    split_interactions(make(histories, days), TEMPORAL)
    split_interactions(make(histories[:1], positions[:1]), TEMPORAL)


# The second user's first events, of one time, open the test, and are nobody's targets.
@example(
    make(
        [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]],
        [[10, 10, 10, 10, 11], [12, 12, 13], [10, 13]],
    ),
    0.5,
)
@given(coded_interactions(), SHARES)
def test_global_temporal_leaves_no_event_out(interactions: Interactions, share: float) -> None:
    """Each event is a train event, a target, or one of a user without a history before it."""
    split = try_split(interactions, SplitKind.GLOBAL_TEMPORAL, share)
    targets = {
        held_out.name: {int(item) for found in held_out.targets for item in found}
        for held_out in (split.validation, split.test)
    }
    train = set(split.train.interactions.items.tolist())
    assert not train & targets["validation"]
    assert not (train | targets["validation"]) & targets["test"]
    times = dict(zip(interactions.items.tolist(), interactions.timestamps.tolist(), strict=True))
    left = set(interactions.items.tolist()) - train - targets["validation"] - targets["test"]
    first_held_out, first_test = map(int, re.findall(r"before (\d+)", split.rule))
    for user in range(interactions.num_users):
        own = interactions.history(user).tolist()
        for item in left & set(own):
            cut = first_test if times[item] >= first_test else first_held_out
            assert not [known for known in own if times[known] < cut]


def test_global_temporal_without_timestamps_names_the_remedy() -> None:
    with pytest.raises(DataError, match=r"data\.columns\.timestamp"):
        split_interactions(make([[1, 2, 3, 4]]), TEMPORAL)


@pytest.mark.parametrize(("histories", "times"), [([[]], [[]]), ([[1, 2]], [[1, 2]])])
def test_global_temporal_needs_three_events(
    histories: list[list[int]], times: list[list[int]]
) -> None:
    with pytest.raises(DataError, match="3 interactions at least"):
        split_interactions(make(histories, times), TEMPORAL)


# --- repeats, errors, words


def test_repeated_targets_are_dropped_and_counted() -> None:
    """Targets whose item is in the history, or came as a target before, cannot be ranked.

    last_fraction 0.5 of 12 holds out 6: validation 1 7 7, test 7 8 1 behind 1 2 3 4 5 6. User 1
    has repeats alone held out and is not asked.
    """
    whole = make([[1, 2, 3, 4, 5, 6, 1, 7, 7, 7, 8, 1], [1, 1, 1, 1]])
    split = split_interactions(whole, DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.5))
    assert queries(split.validation) == {0: ([1, 2, 3, 4, 5, 6], [7])}
    assert queries(split.test) == {0: ([1, 2, 3, 4, 5, 6, 1, 7, 7], [8])}
    # validation: 1 and one 7 of user 0, one 1 of user 1; test: 7 and 1 of user 0, one of user 1
    assert split.validation.num_repeated_targets == 3
    assert split.test.num_repeated_targets == 3
    assert split.test.num_dropped == 1
    assert train_histories(split)[1] == [1, 1]


@pytest.mark.parametrize("config", [LAST_OUT, FRACTION])
@pytest.mark.parametrize("histories", [[], [[]], [[1]], [[1, 2], [3]]])
def test_nobody_to_ask_is_an_error(config: DataConfig, histories: list[list[int]]) -> None:
    with pytest.raises(DataError, match="no user has a query at validation"):
        split_interactions(make(histories), config)


@pytest.mark.parametrize("kind", [SplitKind.LAST_FRACTION, SplitKind.GLOBAL_TEMPORAL])
def test_share_of_zero_is_an_error(kind: SplitKind) -> None:
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        split_interactions(make([[1, 2, 3]]), DataConfig(split=kind, held_out=0.0))


def test_describe_counts_everything() -> None:
    split = split_interactions(make([[1, 2, 3, 4], [5], []]), LAST_OUT)
    rule, train, validation, test = split.describe().split("\n")
    assert rule.startswith("leave_last_out")
    assert "no timestamps" in rule
    assert train == "train: 3 interactions of 2 users"
    assert validation == (
        "validation: 1 users, 1 targets (2 users without a query, 0 repeated targets dropped)"
    )
    assert test.startswith("test: 1 users, 1 targets")


def test_held_out_items_are_in_no_history_and_remain_targets() -> None:
    """They follow from the ids alone: another order of the catalogue holds out the same."""
    catalogue = Catalogue(tuple("abcdefghij"), {"title": tuple("ABCDEFGHIJ")})
    is_new = new_items(catalogue, 0.3)
    chosen = {catalogue.item_ids[i] for i in np.flatnonzero(is_new)}
    assert len(chosen) == 3
    turned = catalogue.take(range(9, -1, -1))
    assert {turned.item_ids[i] for i in np.flatnonzero(new_items(turned, 0.3))} == chosen
    assert not new_items(catalogue, 0.0).any()

    order = [*np.flatnonzero(is_new)[:1], *np.flatnonzero(~is_new), *np.flatnonzero(is_new)[1:]]
    items = np.array(order, dtype=np.int32)
    history = Interactions(catalogue, ("u",), np.array([0, len(items)]), items)
    config = DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.3, hold_out_items=0.3)
    split = split_interactions(history, config)
    assert not is_new[split.train.interactions.items].any()
    assert len(split.train.interactions.items) == 6
    assert not is_new[split.test.histories[0]].any()
    assert is_new[split.test.targets[0]].all()
    assert "3 items are in no history" in split.rule
