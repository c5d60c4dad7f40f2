"""Rows of questions: what they show, in which places, and how long they become."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from pfm_llm.base.errors import DataError
from pfm_llm.data.history import NO_LABEL, History, Query
from pfm_llm.data.interactions import Catalogue
from pfm_llm.likelihood import questions
from pfm_llm.likelihood.questions import QuestionEncoder, QuestionRow, QuestionSettings
from pfm_llm.text.questions import QuestionPrompt
from tests.support.tiny import TITLES, Tiny

PROMPT = QuestionPrompt(
    name="tiny",
    version=1,
    header="H:",
    liked="+",
    disliked="-",
    item="[[{title}]]",
    question="like {title}?",
    answer="A:",
    yes="a",
    no="b",
    fields=("title",),
)
CATALOGUE = Catalogue(tuple(f"i{n}" for n in range(len(TITLES))), {"title": TITLES})


@pytest.fixture(name="encoder")
def make_encoder(tiny: Tiny) -> QuestionEncoder:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    return QuestionEncoder(PROMPT, CATALOGUE, tokenizer, QuestionSettings(shown_items=3), 512)


def query(items: list[int], liked: list[bool], targets: list[int]) -> Query:
    history = History(np.array(items), liked=np.array(liked, bool))
    return Query(0, history, np.array(targets), np.array([t % 2 == 0 for t in targets]))


def texts(tiny: Tiny, row: QuestionRow) -> list[str]:
    """The text of the history, and that of each question."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    parts = range(len(row) + 1)
    return [str(tokenizer.decode(row.tokens[row.parts == part])) for part in parts]


def test_a_row_shows_the_newest_items_liked_ones_first(
    tiny: Tiny, encoder: QuestionEncoder
) -> None:
    (row,) = encoder.rows(query([0, 1, 2, 3], [True, True, False, True], [4, 5]))
    one, two, three, four, five = TITLES[1:6]
    assert texts(tiny, row) == [
        f"H:+[{one}][{three}]-[{two}]",
        f"like {four}?A:",
        f"like {five}?A:",
    ]
    assert row.liked.tolist() == [1, 0]


def test_a_heading_without_items_is_left_out(tiny: Tiny, encoder: QuestionEncoder) -> None:
    (row,) = encoder.rows(query([2], [False], [4]))
    assert texts(tiny, row)[0] == f"H:-[{TITLES[2]}]"
    (row,) = encoder.rows(Query(0, History(np.array([2])), np.array([4])))
    assert texts(tiny, row)[0] == "H:"
    assert row.liked.tolist() == [NO_LABEL]


def test_each_question_begins_where_the_history_ends(encoder: QuestionEncoder) -> None:
    (row,) = encoder.rows(query([0, 1], [True, False], [4, 5, 6]))
    first = int((row.parts == 0).sum())
    for part in range(1, 4):
        places = row.places[row.parts == part]
        assert places.tolist() == list(range(first, first + len(places)))
        assert row.parts[row.ends[part - 1]] == part
    assert row.places[:first].tolist() == list(range(first))
    assert row.ends[-1] == len(row.tokens) - 1


def test_many_questions_are_spread_over_rows(
    encoder: QuestionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = query([0, 1], [True, False], list(range(2, 20)))
    (whole,) = encoder.rows(asked)
    monkeypatch.setattr(questions, "_TOKENS_OF_A_ROW", 60)
    rows = encoder.rows(asked)
    assert len(rows) > 2
    assert all(len(row.tokens) <= 60 for row in rows)
    pieces = [row.tokens[row.parts == part] for row in rows for part in range(1, len(row) + 1)]
    expected = [whole.tokens[whole.parts == part] for part in range(1, len(whole) + 1)]
    assert [one.tolist() for one in pieces] == [one.tolist() for one in expected]
    assert np.concatenate([row.liked for row in rows]).tolist() == whole.liked.tolist()


def test_errors_say_what_to_do(tiny: Tiny, encoder: QuestionEncoder) -> None:
    with pytest.raises(DataError, match="no item in question"):
        encoder.rows(query([0], [True], []))
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    with pytest.raises(DataError, match="lower shown_items"):
        QuestionEncoder(PROMPT, CATALOGUE, tokenizer, QuestionSettings(shown_items=100), 512)
