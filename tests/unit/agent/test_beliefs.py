"""What an agent believes: counts that anybody can check, and what its private part moves."""

from pathlib import Path

import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.beliefs import PUSHED, Account, Value, shares_of_values, values_of
from pfm_llm.data.interactions import Catalogue
from pfm_llm.recommender import Recommender
from tests.support.agents import HISTORY


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Comedy, War", {"Comedy", "War"}),
        ("1996", {"1990s"}),
        ("1996.5", {"1996.5"}),
        (" Drama ,, Drama", {"Drama"}),
        ("", set()),
    ],
)
def test_values_are_parts_and_decades(text: str, values: set[str]) -> None:
    assert values_of(text) == values


def test_values_are_counted_in_the_history_and_in_the_list() -> None:
    fields = {
        "title": ("a", "b", "c", "d"),
        "year": ("1996", "1987", "1989", ""),
        "genres": ("Comedy, War", "Comedy", "Drama", "War"),
    }
    found = shares_of_values(Catalogue(("1", "2", "3", "4"), fields), [0, 1, 3], [2, 3])
    assert found == {
        "year": (Value("1980s", 1 / 3, 1 / 2), Value("1990s", 1 / 3, 0)),
        "genres": (Value("War", 2 / 3, 1 / 2), Value("Comedy", 2 / 3, 0), Value("Drama", 0, 1 / 2)),
    }
    nobody = shares_of_values(Catalogue(("1",), {"title": ("a",), "year": ("1996",)}), [], [0])
    assert nobody == {"year": (Value("1990s", 0, 1),)}


def test_the_items_that_move_most_are_named(agent: PersonalAgent, model: Recommender) -> None:
    found = agent.beliefs()
    own = {one.item_id: one.own for one in agent.recommend(len(model.catalogue))}
    order = sorted(own.values())
    up, down = ([one.own for one in side] for side in (found.up, found.down))
    assert up == pytest.approx([one for one in order[::-1] if one > 0][:PUSHED])
    assert down == pytest.approx([one for one in order if one < 0][:PUSHED])
    assert up
    assert down
    assert all(own[one.item_id] == pytest.approx(one.own) for one in (*found.up, *found.down))


def test_evidence_and_size_are_said(agent: PersonalAgent, model: Recommender) -> None:
    agent.exclude(agent.history()[0].item_id)
    found = agent.beliefs()
    private = agent.private_part().values()
    assert (found.num_events, found.num_counted) == (len(HISTORY), len(HISTORY) - 1)
    assert found.num_numbers == sum(one.numel() for one in private) > 0
    assert found.num_bytes == sum(one.numpy().nbytes for one in private)
    assert found.account == Account(last_sync=None, bytes_sent=0, epsilon=None)


def test_somebody_of_whom_nothing_is_known_has_no_evidence(
    model: Recommender, tmp_path: Path
) -> None:
    found = PersonalAgent(model, tmp_path / "new").beliefs()
    assert (found.num_events, found.num_counted) == (0, 0)
    assert all(value.in_history == 0 for values in found.values.values() for value in values)
