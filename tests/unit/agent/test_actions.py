"""What follows from a user's actions, whatever was taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.agent.actions import NOT_NOW_SECONDS, Action, Event, Kind, Known

_ITEMS = st.sampled_from(["a", "b", "c", "d"])
_TIMES = st.integers(0, 20).map(float)
_NAMED = st.builds(Action, kind=st.sampled_from(Kind), at=_TIMES, item_id=_ITEMS)
_PERIODS = st.builds(Action, kind=st.just(Kind.EXCLUDE), at=_TIMES, since=_TIMES, until=_TIMES)


def _met(item_id: str, at: float) -> Action:
    return Action(kind=Kind.MET, at=at, item_id=item_id)


def _excluded(**what: object) -> Action:
    return Action.model_validate({"kind": "exclude", "at": 99.0, **what})


def test_events_are_in_order_of_time_and_an_item_comes_once() -> None:
    actions = [_met("b", 3), _met("a", 1), Action(kind=Kind.LIKE, at=2, item_id="b", rating=5)]
    known = Known.of(actions)
    assert known.events == (Event("a", 1, None, True), Event("b", 2, 5, True))
    assert known.counted == known.events
    assert known.hidden == {"a", "b"}


def test_an_excluded_item_does_not_count_and_is_not_shown_again() -> None:
    known = Known.of([_met("a", 1), _met("b", 2), _excluded(item_id="a")])
    assert [event.item_id for event in known.counted] == ["b"]
    assert [event.item_id for event in known.events] == ["a", "b"]
    assert known.is_hidden("a", 100)


def test_a_period_excludes_from_its_begin_to_before_its_end() -> None:
    actions = [_met(name, at) for name, at in zip("abcd", range(1, 5), strict=True)]
    known = Known.of([*actions, _excluded(since=2, until=4)])
    assert [event.item_id for event in known.counted] == ["a", "d"]


def test_an_item_that_was_met_again_counts_from_the_first_time_that_is_not_excluded() -> None:
    known = Known.of([_met("a", 1), _met("b", 2), _met("a", 3), _excluded(since=0, until=2)])
    assert known.counted == (Event("b", 2, None, True), Event("a", 3, None, True))


def test_what_is_turned_down_is_hidden_and_no_event() -> None:
    turned = [Kind.DISLIKE, Kind.LESS_LIKE_THIS]
    known = Known.of([Action(kind=kind, at=1, item_id=kind) for kind in turned])
    assert known.events == ()
    assert known.hidden == set(turned)
    assert known.less == (Kind.LESS_LIKE_THIS,)


def test_not_now_ends() -> None:
    known = Known.of([Action(kind=Kind.NOT_NOW, at=10, item_id="a")])
    assert known.is_hidden("a", 10 + NOT_NOW_SECONDS - 1)
    assert not known.is_hidden("a", 10 + NOT_NOW_SECONDS)
    assert not known.is_hidden("b", 10)


@given(st.lists(_NAMED | _PERIODS, max_size=12), st.data())
def test_an_excluded_item_leaves_what_its_absence_would_leave(
    actions: list[Action], data: st.DataObject
) -> None:
    item = data.draw(_ITEMS)
    excluded = Known.of([*actions, _excluded(item_id=item)])
    absent = Known.of([action for action in actions if action.item_id != item])
    assert excluded.counted == absent.counted


@given(st.lists(_NAMED | _PERIODS, max_size=12))
def test_the_order_of_the_list_has_no_say_where_times_differ(actions: list[Action]) -> None:
    spread = [a.model_copy(update={"at": a.at + n / 100}) for n, a in enumerate(actions)]
    assert Known.of(spread) == Known.of(reversed(spread))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "met", "at": 1},
        {"kind": "exclude", "at": 1, "item_id": "a", "since": 1, "until": 2},
        {"kind": "exclude", "at": 1, "since": 1},
        {"kind": "like", "at": 1, "since": 1, "until": 2},
        {"kind": "love", "at": 1, "item_id": "a"},
        {"kind": "like", "at": "now", "item_id": "a"},
        {"kind": "like", "at": float("nan"), "item_id": "a"},
        {"kind": "like", "at": 1, "item_id": "a", "mood": "good"},
    ],
)
def test_an_action_that_says_nothing_clear_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Action.model_validate(wrong)
