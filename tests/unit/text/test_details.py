"""Tests of pfm_llm.text.details: which columns of a catalogue describe its items."""

import pytest

from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.details import detail_fields, details

KINDS = {
    "year": ("1995", "2004", "", "1987"),
    "genres": ("Comedy, Drama", "War", "", "Drama"),
    "brand": ("Philips", "Bosch", "3M", "Miele"),
    "description": ("A long text that says much about the first item.", "Another one.", "", "x y"),
    "price": ("$12.99", "7", "1,000.50", "3"),
    "count": ("1", "22", "333", "4"),
    "released": ("1995-01-01", "2004-02-03", "", "1987-12-31"),
    "asin": ("B000FTH2HA", "B0013MN8S2", "B00005N7P0", "B000GD0S5S"),
    "url": ("https://x.org/1", "https://x.org/2", "", "https://x.org/4"),
    "poster": ("a.jpg", "b.png", "c.jpeg", ""),
    "empty": ("", "", "", ""),
}


def catalogue(*names: str) -> Catalogue:
    fields = {"title": ("A", "B", "C", "D"), **{name: KINDS[name] for name in names}}
    return Catalogue(("1", "2", "3", "4"), fields)


@pytest.mark.parametrize(
    ("name", "describes"),
    [
        *((name, True) for name in ("year", "genres", "brand", "description")),
        *((name, False) for name in ("price", "count", "released", "asin")),
        *((name, False) for name in ("url", "poster", "empty")),
    ],
)
def test_words_and_years_describe_an_item_and_numbers_links_and_keys_do_not(
    name: str, describes: bool
) -> None:
    assert detail_fields(catalogue(name)) == ((name,) if describes else ())


def test_the_shortest_texts_come_first_and_unknown_ones_leave_nothing() -> None:
    several = catalogue("description", "genres", "year", "price")
    assert detail_fields(several) == ("year", "genres", "description")
    first, second, third, _ = details(several)
    assert first == "1995, Comedy, Drama, A long text that says much about the first item."
    assert second == "2004, War, Another one."
    assert third == ""


def test_a_text_that_two_fields_have_is_said_once() -> None:
    fields = {"title": ("A",), "category": ("Pads",), "kind": ("Pads",)}
    assert details(Catalogue(("1",), fields)) == ["Pads"]


def test_a_catalogue_of_titles_has_no_details() -> None:
    assert details(catalogue()) == ["", "", "", ""]
