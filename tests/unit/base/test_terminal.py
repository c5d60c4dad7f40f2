"""Text from files on a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.terminal import columns, fitted, harmless, printable


def test_a_harmless_text_is_one_line_without_control_characters() -> None:
    assert harmless("a\x1b[2J\n b\t\u202ec\u00a0d") == "a�[2J b �c d"
    assert harmless("Amélie 天") == "Amélie 天"


@given(st.text())
def test_any_text_becomes_harmless(text: str) -> None:
    assert all(character.isprintable() for character in harmless(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "      "),
        ("Heat", "Heat  "),
        ("Brazil", "Brazil"),
        ("Brazil 2", "Brazi…"),
        ("The  Birdcage", "The…  "),
        ("天天天", "天天天"),
        ("天天天天", "天天… "),
        ("e\u0301" * 7, "e\u0301" * 5 + "…"),
    ],
)
def test_a_fitted_text_fills_its_columns(text: str, shown: str) -> None:
    assert fitted(text, 6) == shown
    assert columns(shown) == 6


def test_a_printable_message_keeps_its_lines_alone() -> None:
    assert printable("a\n\tb\x1b[2J\u202e\r\x00") == "a\n\tb�[2J���"
