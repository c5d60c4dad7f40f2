"""Histories: order, repeats, short histories, samples of users, and their accounting."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.config.choices import Repeats
from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import (
    NOT_SAMPLED,
    REPEAT,
    TOO_FEW,
    Catalogue,
    Interactions,
    RawInteractions,
    build_interactions,
)

LETTERS = Catalogue(tuple("abcde"), {"title": ("Ash", "Birch", "Cedar", "Dogwood", "Elm")})
KEEP_ALL = DataConfig(min_interactions=1, repeats=Repeats.ALLOW)
SMALL = Interactions(LETTERS, ("u", "v"), np.array([0, 2, 3]), np.array([4, 0, 1]))


def raw(users: str, items: list[int], **changes: object) -> RawInteractions:
    return dataclasses.replace(
        RawInteractions(LETTERS, list(users), np.array(items, dtype=np.int64)), **changes
    )


def histories(interactions: Interactions) -> dict[str, list[int]]:
    return {
        user: interactions.history(index).tolist()
        for index, user in enumerate(interactions.user_ids)
    }


def test_histories_are_in_time_order_and_ties_keep_file_order() -> None:
    rows = raw("vuvuv", [3, 2, 1, 0, 4], timestamps=np.array([9, 5, 7, 5, 7]))
    interactions, report = build_interactions(rows, KEEP_ALL, seed=0)
    # v: 7 (b), 7 (e), 9 (d); b comes before e in the file. u: 5 (c), 5 (a): c comes first.
    assert histories(interactions) == {"v": [1, 4, 3], "u": [2, 0]}
    assert interactions.timestamps is not None
    assert interactions.timestamps.tolist() == [7, 7, 9, 5, 5]
    assert any(note.startswith("2 rows share their time") for note in report.notes)


def test_without_timestamps_file_order_counts_and_the_report_says_so() -> None:
    interactions, report = build_interactions(raw("uvuv", [3, 2, 1, 0]), KEEP_ALL, seed=0)
    assert histories(interactions) == {"u": [3, 1], "v": [2, 0]}
    assert interactions.timestamps is None
    assert "no timestamps: file order is taken as order in time" in report.describe()


@pytest.mark.parametrize("timestamps", [None, np.zeros(3000, dtype=np.int64)])
def test_file_order_holds_over_thousands_of_ties(timestamps: np.ndarray | None) -> None:
    """Short arrays would also keep their order under a sort that is not stable."""
    items = np.random.default_rng(0).integers(0, 5, size=3000)
    rows = raw("uvw" * 1000, items.tolist(), timestamps=timestamps)
    interactions, _ = build_interactions(rows, KEEP_ALL, seed=0)
    for user in range(3):
        assert interactions.history(user).tolist() == items[user::3].tolist()


def test_first_only_keeps_the_earliest_in_time_not_in_the_file() -> None:
    rows = raw("uuuu", [0, 1, 2, 0], timestamps=np.array([5, 2, 3, 1]))
    config = DataConfig(min_interactions=1, repeats=Repeats.FIRST_ONLY)
    interactions, report = build_interactions(rows, config, seed=0)
    assert histories(interactions) == {"u": [0, 1, 2]}
    assert interactions.timestamps is not None
    assert interactions.timestamps.tolist() == [1, 2, 3]
    assert report.dropped == {REPEAT: 1}


def test_a_history_is_too_short_after_its_repeats_went() -> None:
    config = DataConfig(min_interactions=2, repeats=Repeats.FIRST_ONLY)
    interactions, report = build_interactions(raw("uuvv", [0, 0, 1, 2]), config, seed=0)
    assert histories(interactions) == {"v": [1, 2]}
    assert report.dropped == {REPEAT: 1, TOO_FEW: 1}


def test_the_sample_of_users_depends_on_the_seed_alone_and_leaves_the_catalogue() -> None:
    users = [f"u{index}" for index in range(40) for _ in range(2)]
    rows = dataclasses.replace(raw("", []), users=users, items=np.arange(80) % 5)
    config = DataConfig(min_interactions=2, max_users=10)
    first, report = build_interactions(rows, config, seed=1)
    again, _ = build_interactions(rows, config, seed=1)
    other, _ = build_interactions(rows, config, seed=2)
    assert first.content_hash() == again.content_hash()
    assert set(first.user_ids) != set(other.user_ids)
    assert first.num_users == 10
    assert list(first.user_ids) == sorted(first.user_ids, key=users.index)
    assert report.dropped == {NOT_SAMPLED: 60}  # 30 users of 2 rows
    assert first.catalogue is rows.catalogue


def test_a_sample_larger_than_the_users_keeps_them_all() -> None:
    config = DataConfig(min_interactions=1, max_users=2)
    interactions, report = build_interactions(raw("uv", [0, 1]), config, seed=0)
    assert interactions.user_ids == ("u", "v")
    assert report.dropped == {}


def test_fractions_of_a_time_are_kept() -> None:
    rows = raw("uu", [0, 1], timestamps=np.array([-0.25, -0.75]))
    interactions, _ = build_interactions(rows, KEEP_ALL, seed=0)
    assert histories(interactions) == {"u": [1, 0]}
    assert interactions.timestamps is not None
    assert interactions.timestamps.tolist() == [-0.75, -0.25]


def test_large_integer_times_lose_no_digit() -> None:
    times = np.array([2**62 + 1, 2**62], dtype=np.int64)  # equal as float64
    interactions, _ = build_interactions(raw("uu", [0, 1], timestamps=times), KEEP_ALL, seed=0)
    assert histories(interactions) == {"u": [1, 0]}
    assert interactions.timestamps is not None
    assert interactions.timestamps.tolist() == [2**62, 2**62 + 1]


def test_ratings_and_user_fields_go_with_their_rows_and_users() -> None:
    rows = raw(
        "uvu",
        [0, 1, 2],
        timestamps=np.array([2, 1, 1]),
        ratings=np.array([3.5, 4.0, 5.0]),
        user_fields={"age": {"v": "31", "nobody": "99"}},
    )
    interactions, _ = build_interactions(rows, KEEP_ALL, seed=0)
    assert interactions.ratings is not None
    assert interactions.ratings.dtype == np.float32
    assert interactions.ratings.tolist() == [5.0, 3.5, 4.0]
    assert interactions.user_fields == {"age": ("", "31")}


@given(
    rows=st.lists(st.tuples(st.sampled_from("uvw"), st.integers(0, 4), st.integers(0, 3))),
    repeats=st.sampled_from(list(Repeats)),
    min_interactions=st.integers(1, 3),
)
def test_building_equals_brute_force_and_accounts_for_every_row(
    rows: list[tuple[str, int, int]], repeats: Repeats, min_interactions: int
) -> None:
    config = DataConfig(min_interactions=min_interactions, repeats=repeats)
    expected: dict[str, list[int]] = defaultdict(list)
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # stable
        if repeats is Repeats.ALLOW or item not in expected[user]:
            expected[user].append(item)
    expected = {user: h for user, h in expected.items() if len(h) >= min_interactions}
    users, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    given_rows = raw("".join(users), list(items), timestamps=np.array(times, dtype=np.int64))
    if not expected:
        with pytest.raises(DataError, match="no interactions left"):
            build_interactions(given_rows, config, seed=0)
        return
    interactions, report = build_interactions(given_rows, config, seed=0)
    assert histories(interactions) == expected
    assert report.num_rows == len(rows)
    assert report.num_interactions == sum(map(len, expected.values()))
    assert report.num_rows == report.num_interactions + sum(report.dropped.values())


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("uv"), st.integers(0, 4), st.integers(0, 1)), min_size=1
    ),
    renumbering=st.permutations(range(5)),
)
def test_item_ids_do_not_decide_anything(
    rows: list[tuple[str, int, int]], renumbering: list[int]
) -> None:
    users, items, times = zip(*rows, strict=True)
    config = DataConfig(min_interactions=1)
    there = raw("".join(users), list(items), timestamps=np.array(times))
    renamed = dataclasses.replace(there, items=np.array(renumbering)[there.items])
    plain, _ = build_interactions(there, config, seed=0)
    other, _ = build_interactions(renamed, config, seed=0)
    assert [renumbering[item] for item in plain.items] == other.items.tolist()


def test_bad_rows_are_counted_with_what_is_dropped_later() -> None:
    rows = raw("uuv", [0, 1, 2], num_bad={"torn": 2}, examples=("f line 4: torn",))
    interactions, report = build_interactions(rows, DataConfig(min_interactions=2), seed=0)
    assert report.num_rows == 5
    assert report.dropped == {"torn": 2, TOO_FEW: 1}
    assert interactions.num_interactions == 2
    assert "bad row, for example: f line 4: torn" in report.describe()


def test_items_with_equal_text_in_every_field_are_reported() -> None:
    catalogue = Catalogue(
        tuple("abcdef"),
        {"title": ("X", "X", "X", "Y", "Y", "Z"), "year": ("1", "1", "1", "1", "2", "1")},
    )
    rows = RawInteractions(catalogue, ["u"], np.array([5]))
    _, report = build_interactions(rows, DataConfig(min_interactions=1), seed=0)
    # a, b, c are one group with two later items; the two Y differ by their year.
    [note] = [note for note in report.notes if "same text" in note]
    assert note.startswith("2 items have the same text as an earlier item, in 1 groups")
    assert "'X' (a, b, c)" in note


def test_items_without_interactions_stay_and_are_counted() -> None:
    interactions, report = build_interactions(raw("u", [1]), KEEP_ALL, seed=0)
    assert len(interactions.catalogue) == report.num_items == 5
    told = "4 of 5 items of the catalogue have no interactions; data.met_items_only: true leaves"
    assert any(note.startswith(told) for note in report.notes)


def test_items_that_nobody_met_can_be_left_out() -> None:
    asked = KEEP_ALL.model_copy(update={"met_items_only": True})
    interactions, report = build_interactions(raw("uuv", [3, 1, 3]), asked, seed=0)
    assert report.num_items == 2
    assert interactions.catalogue.item_ids == tuple(
        raw("u", [0]).catalogue.item_ids[i] for i in (1, 3)
    )
    assert histories(interactions) == {"u": [1, 0], "v": [1]}
    with pytest.raises(DataError, match="fewer than 2 items"):
        build_interactions(raw("u", [1]), asked, seed=0)


def test_one_item_is_no_catalogue() -> None:
    catalogue = Catalogue(("a",), {"title": ("Ash",)})
    rows = RawInteractions(catalogue, ["u"], np.array([0]))
    with pytest.raises(DataError, match="1 item: ranking needs at least 2 items"):
        build_interactions(rows, KEEP_ALL, seed=0)


def test_an_empty_result_says_what_became_of_the_rows() -> None:
    rows = raw("uv", [0, 1], num_bad={"torn": 1}, examples=("f line 4: torn",))
    with pytest.raises(DataError, match="no interactions left of 3 rows") as caught:
        build_interactions(rows, DataConfig(min_interactions=2), seed=0)
    assert f"2 dropped: {TOO_FEW}" in str(caught.value)
    assert "f line 4: torn" in str(caught.value)
    with pytest.raises(DataError, match="no interactions left of 0 rows"):
        build_interactions(raw("", []), KEEP_ALL, seed=0)


def test_a_history_is_a_read_only_view() -> None:
    mine = np.array([4, 0, 1], dtype=np.int32)
    interactions = dataclasses.replace(SMALL, items=mine)
    history = interactions.history(0)
    assert history.tolist() == [4, 0]
    assert np.shares_memory(history, mine)
    with pytest.raises(ValueError, match="read-only"):
        history[0] = 1
    mine[0] = 2  # the caller's own array stays writable


def test_ratings_stand_beside_their_history() -> None:
    """Three events: two of the first user, one of the second."""
    ratings = np.array([1.0, 2.5, 4.0], dtype=np.float32)
    offsets, items = np.array([0, 2, 3]), np.array([4, 0, 1])
    rated = Interactions(LETTERS, ("u", "v"), offsets, items, ratings=ratings)
    histories = [rated.history_of(user) for user in (0, 1)]
    assert [history.items.tolist() for history in histories] == [[4, 0], [1]]
    assert [history.ratings.tolist() for history in histories] == [[1.0, 2.5], [4.0]]
    assert Interactions(LETTERS, ("u", "v"), offsets, items).history_of(0).ratings is None


def test_users_may_have_empty_histories() -> None:
    interactions = Interactions(LETTERS, ("u", "v"), np.zeros(3), np.zeros(0))
    assert interactions.num_interactions == 0
    assert interactions.history(1).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": np.array([0, 3])}, "offsets of shape"),
        ({"offsets": np.array([0, 2, 2])}, "must rise from 0 to 3"),
        ({"offsets": np.array([1, 2, 3])}, "must rise from 0 to 3"),
        ({"offsets": np.array([0, 4, 3])}, "must rise from 0 to 3"),
        ({"items": np.array([4, 0, 5])}, r"in \[0, 5\)"),
        ({"items": np.array([4, 0, -1])}, r"in \[0, 5\)"),
        ({"timestamps": np.array([1, 2])}, "timestamps of shape"),
        ({"ratings": np.ones((3, 1))}, "ratings of shape"),
        ({"user_ids": ("u", "u")}, "'u' comes twice"),
        ({"user_fields": {"age": ("1",)}}, "'age' has 1 values for 2 ids"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        (("a", "b"), {"name": ("A", "B")}, "no text field 'title'; its fields: name"),
        (("a", "a"), {"title": ("A", "B")}, "'a' comes twice"),
        (("a", "b"), {"title": ("A",)}, "'title' has 1 values for 2 ids"),
    ],
)
def test_a_catalogue_has_distinct_ids_and_whole_fields(
    ids: tuple[str, ...], fields: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Catalogue(ids, fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"user_ids": ("u", "w")},
        {"offsets": np.array([0, 1, 3])},
        {"items": np.array([0, 4, 1])},
        {"timestamps": np.array([0, 0, 0])},
        {"ratings": np.array([0, 0, 0])},
        {"user_fields": {"age": ("", "")}},
        {"catalogue": Catalogue(LETTERS.item_ids, {"title": ("Ash", "Birch", "C", "D", "E")})},
    ],
)
def test_the_hash_depends_on_every_part(changes: dict[str, object]) -> None:
    assert dataclasses.replace(SMALL).content_hash() == SMALL.content_hash()
    assert dataclasses.replace(SMALL, **changes).content_hash() != SMALL.content_hash()


def test_the_catalogue_hash_sees_where_a_text_ends_but_not_the_order_of_fields() -> None:
    ids = ("1", "2")
    one = Catalogue(ids, {"title": ("ab", "c"), "year": ("x", "y")})
    other = Catalogue(ids, {"title": ("a", "bc"), "year": ("x", "y")})
    turned = Catalogue(ids, {"year": ("x", "y"), "title": ("ab", "c")})
    swapped = Catalogue(ids, {"year": ("ab", "c"), "title": ("x", "y")})
    assert one.content_hash() == turned.content_hash()
    assert len({one.content_hash(), other.content_hash(), swapped.content_hash()}) == 3


def test_a_user_may_be_given_as_a_number() -> None:
    rows = RawInteractions(LETTERS, ["7", "8"], np.array([0, 1]))
    interactions, _ = build_interactions(rows, KEEP_ALL, seed=0)
    assert interactions.user(8) == interactions.user("8") == 1
    with pytest.raises(DataError, match="no user 9 in the data; users are 7, 8"):
        interactions.user(9)
