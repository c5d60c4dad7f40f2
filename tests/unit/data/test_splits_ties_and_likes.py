"""Splits that keep ties together, and the labels of held-out items."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import SplitKind
from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import HeldOut, split_interactions
from tests.unit.data.split_cases import (
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

# --- keep_ties: events of one user and one time are on one side of each cut


def keeping_ties(config: DataConfig) -> DataConfig:
    return config.model_copy(update={"keep_ties": True})


def test_leave_last_out_with_ties_holds_out_the_last_two_groups() -> None:
    """User 0 has baskets 1 2 | 3 | 4 5 | 6 7 8; user 1 has three of one item."""
    whole = make([[1, 2, 3, 4, 5, 6, 7, 8], [0, 9, 10]], [[1, 1, 2, 5, 5, 7, 7, 7], [1, 2, 3]])
    split = split_interactions(whole, keeping_ties(LAST_OUT))
    assert train_histories(split) == [[1, 2, 3], [0]]
    assert queries(split.validation) == {0: ([1, 2, 3], [4, 5]), 1: ([0], [9])}
    assert queries(split.test) == {0: ([1, 2, 3, 4, 5], [6, 7, 8]), 1: ([0, 9], [10])}
    assert "keep_ties" in split.rule


@pytest.mark.parametrize("config", [LAST_OUT, FRACTION])
def test_users_with_two_groups_are_all_train(config: DataConfig) -> None:
    """Four events at two times cannot be cut into three, nor two at one, nor none."""
    times = [[1, 1, 2, 2], [5, 5], [], [1, 2, 3]]
    whole = make([[1, 2, 3, 4], [5, 6], [], [7, 8, 9]], times)
    split = split_interactions(whole, keeping_ties(config))
    assert train_histories(split) == [[1, 2, 3, 4], [5, 6], [], [7]]
    assert split.validation.users.tolist() == split.test.users.tolist() == [3]


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        # 10 events, share 0.4: cuts before events 6 and 8.
        ([6, 2, 2], (6, 2, 2)),  # where groups begin: nothing moves
        ([5, 3, 2], (5, 3, 2)),  # 6 lies in the second group: back to its start, 5
        ([4, 3, 1, 1, 1], (4, 4, 2)),  # 6 moves back to 4; 8 is a place
        ([4, 3, 2, 1], (4, 3, 3)),  # 6 to 4, 8 to 7
        ([4, 5, 1], (4, 5, 1)),  # 6 to 4; 8 would go to 4 too: on to 9
        ([7, 1, 1, 1], (7, 1, 2)),  # 6 lies in the first group: on to 7
        ([8, 1, 1], (8, 1, 1)),  # 6 on to 8, so 8 on to 9
        ([1, 1, 8], (1, 1, 8)),  # 6 would go to 2 and leave no place for 8: back to 1
    ],
)
def test_last_fraction_with_ties_moves_cuts_back_unless_a_part_would_be_empty(
    groups: list[int], parts: tuple[int, int, int]
) -> None:
    times = [time for time, size in enumerate(groups) for _ in range(size)]
    whole = make([list(range(10))], [times])
    config = DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.4, keep_ties=True)
    split = split_interactions(whole, config)
    sizes = (len(train_histories(split)[0]), len(split.validation.targets[0]))
    assert (*sizes, len(split.test.targets[0])) == parts


@given(coded_interactions(), KINDS, SHARES)
def test_with_ties_kept_no_time_of_a_user_is_on_two_sides(
    interactions: Interactions, kind: SplitKind, share: float
) -> None:
    split = try_split(interactions, kind, share, keep_ties=True)
    times = dict(zip(interactions.items.tolist(), interactions.timestamps.tolist(), strict=True))
    train, validation, test = train_histories(split), queries(split.validation), queries(split.test)
    for user in range(interactions.num_users):
        targets = [validation.get(user, ([], []))[1], test.get(user, ([], []))[1]]
        parts = [{times[item] for item in part} for part in (train[user], *targets)]
        assert sum(map(len, parts)) == len(set.union(*parts))


@given(coded_interactions(), st.sampled_from([LAST_OUT, FRACTION]), SHARES)
def test_with_ties_kept_whoever_has_three_times_is_asked_twice(
    interactions: Interactions, config: DataConfig, share: float
) -> None:
    split = try_split(interactions, config.split, share, keep_ties=True)
    bounds = zip(interactions.offsets[:-1], interactions.offsets[1:], strict=True)
    num_times = [len(np.unique(interactions.timestamps[a:b])) for a, b in bounds]
    able = [user for user, count in enumerate(num_times) if count >= 3]
    assert split.validation.users.tolist() == split.test.users.tolist() == able
    for user, train in enumerate(train_histories(split)):
        whole = interactions.history(user).tolist()
        assert train if user in able else train == whole


@given(coded_interactions(), KINDS, SHARES)
def test_without_ties_keeping_them_changes_nothing(
    interactions: Interactions, kind: SplitKind, share: float
) -> None:
    distinct = dataclasses.replace(interactions, timestamps=np.arange(len(interactions.items)))
    plain, kept = (try_split(distinct, kind, share, keep_ties=keep) for keep in (False, True))
    assert train_histories(plain) == train_histories(kept)
    assert queries(plain.validation) == queries(kept.validation)
    assert queries(plain.test) == queries(kept.test)


@pytest.mark.parametrize("config", [LAST_OUT, FRACTION])
def test_keeping_ties_without_timestamps_names_the_remedy(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data\.keep_ties needs timestamps"):
        split_interactions(make([[1, 2, 3, 4]]), keeping_ties(config))


# --- ratings of the targets: the labels of the task `like`


def test_ratings_stay_with_their_targets_when_repeats_go() -> None:
    """Ratings are the event's index and a half; of a repeated target the first counts.

    Validation holds out 1 7 7 (events 6, 7, 8) behind 1..6, test 7 8 1 (events 9, 10, 11).
    """
    whole = make([[1, 2, 3, 4, 5, 6, 1, 7, 7, 7, 8, 1]], ratings=True)
    split = split_interactions(whole, DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.5))
    assert split.validation.targets[0].tolist() == [7]
    assert split.validation.target_ratings is not None
    assert split.validation.target_ratings[0].tolist() == [7.5]
    assert split.test.targets[0].tolist() == [8]
    assert split.test.target_ratings is not None
    assert split.test.target_ratings[0].tolist() == [10.5]


def test_likes_begin_at_the_threshold() -> None:
    """One user of 20 events: the four held out of test are rated 16.5, 17.5, 18.5 and 19.5."""
    whole = make([list(range(20))], ratings=True)
    split = split_interactions(whole, DataConfig(split=SplitKind.LAST_FRACTION, held_out=0.4))
    [liked] = split.test.liked(18.5)
    assert liked.dtype == np.bool_
    assert liked.tolist() == [False, False, True, True]
    assert [one.tolist() for one in split.validation.liked(0)] == [[True] * 4]


def test_likes_without_ratings_name_the_remedy() -> None:
    split = split_interactions(make([[1, 2, 3]]), LAST_OUT)
    assert split.test.target_ratings is None
    with pytest.raises(DataError, match=r"test: likes need ratings .* data\.columns\.rating"):
        split.test.liked(4)


def test_some_queries_take_everything_of_theirs_along() -> None:
    whole = make([[1, 2, 3], [4, 5, 6], [7, 8, 9, 0]], ratings=True)
    test = split_interactions(whole, LAST_OUT).test
    some = test.take([2, 0])
    assert some.users.tolist() == [2, 0]
    assert [history.tolist() for history in some.histories] == [[7, 8, 9], [1, 2]]
    assert [targets.tolist() for targets in some.targets] == [[0], [3]]
    assert some.history_ratings is not None
    assert [ratings.tolist() for ratings in some.history_ratings] == [[6.5, 7.5, 8.5], [0.5, 1.5]]
    assert some.target_ratings is not None
    assert [ratings.tolist() for ratings in some.target_ratings] == [[9.5], [2.5]]
    assert (some.name, some.num_dropped) == ("test", test.num_dropped)
    assert {field.name for field in dataclasses.fields(HeldOut)} == {
        *("name", "users", "histories", "history_ratings", "targets", "target_ratings"),
        *("num_dropped", "num_repeated_targets"),
    }, "a new field must be taken along, too"
    none = split_interactions(make([[1, 2, 3]]), LAST_OUT).test.take(np.array([0]))
    assert none.history_ratings is none.target_ratings is None


def test_labels_of_other_targets_are_not_taken_for_these() -> None:
    """Half a selection, as `dataclasses.replace` may leave it, is caught where labels are read."""
    whole = make([[1, 2, 3], [4, 5, 6]], ratings=True)
    test = split_interactions(whole, LAST_OUT).test
    half = dataclasses.replace(test, users=test.users[1:], targets=test.targets[1:])
    with pytest.raises(DataError, match=r"HeldOut\.take"):
        half.liked(4)
