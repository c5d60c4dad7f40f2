"""A history is typed by ids, titles and parts of titles."""

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.data.interactions import Catalogue
from pfm_llm.data.titles import find_items

TITLES = ("Star Wars", "Fargo", "Good, the Bad and the Ugly, The", "Alien", "Aliens", "Alien 3")
CATALOGUE = Catalogue(tuple("abcdef"), {"title": TITLES})


@pytest.mark.parametrize(
    ("typed", "items"),
    [
        ("a,b", ["a", "b"]),
        ("star wars, FARGO", ["a", "b"]),
        ("Fargo, Good, the Bad and the Ugly, The, a", ["b", "c", "a"]),
        ("wars", ["a"]),
        ("Alien", ["d"]),
        ("aliens,", ["e"]),
        ("", []),
        ("Fargoo, Star Wras", ["b", "a"]),
    ],
)
def test_items_are_found_by_what_a_person_types(typed: str, items: list[str]) -> None:
    assert find_items(CATALOGUE, typed) == items


def test_a_name_of_several_items_lists_them() -> None:
    with pytest.raises(DataError, match=r"3 items have 'lien' .* Alien \[d\]; Aliens \[e\]"):
        find_items(CATALOGUE, "lien")


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(DataError, match=r"no item 'Fargoville' .* there are Fargo"):
        find_items(CATALOGUE, "Fargoville")
    with pytest.raises(DataError, match="no item 'Alienss'"):
        find_items(CATALOGUE, "Alienss")  # Alien or Aliens?
    with pytest.raises(DataError, match="no item 'zzzz'"):
        find_items(CATALOGUE, "zzzz")
