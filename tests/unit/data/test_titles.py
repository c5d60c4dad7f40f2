"""Items by what people type."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import DataError
from pfm_llm.data.interactions import Catalogue
from pfm_llm.data.titles import TitleSearch, find_items

FILMS = {
    "50": "Star Wars (1977)",
    "100": "Fargo (1996)",
    "127": "Godfather, The (1972)",
    "187": "Godfather: Part II, The (1974)",
    "1": "Toy Story (1995)",
    "246": "Chasing Amy (1997)",
    "268": "Chasing Amy (1997)",
    "274": "Sabrina (1995)",
    "486": "Sabrina (1954)",
    "11": "Seven (Se7en) (1995)",
    "14": "Postino, Il (1994)",
    "902": "Big Lebowski, The (1998)",
    "90": "Cité des enfants perdus, La (City of Lost Children, The) (1995)",
    "177": "Good, The Bad and The Ugly, The (1966)",
    "x,y": "Dolls & Boys",
    "1984": "Brazil (1985)",
    "b": "1984",
    "e": "\x1b[31mRed\x1b[0m Desert",
}
CATALOGUE = Catalogue(tuple(FILMS), {"title": tuple(FILMS.values())})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Star Wars, Fargo", ["50", "100"]),
        ("50,100", ["50", "100"]),
        ("Fargo, 50, Fargo", ["100", "50", "100"]),
        ("STAR wars (1977)", ["50"]),
        ("  star  wars ,, ", ["50"]),
        ("godfather", ["127"]),
        ("The Godfather", ["127"]),
        ("Godfather, The, Fargo", ["127", "100"]),
        ("Godfather, The (1972), Fargo", ["127", "100"]),
        ('"Godfather, The", Fargo', ["127", "100"]),
        ('"Godfather: Part II, The (1974)"', ["187"]),
        ("the godfather part ii", ["187"]),
        ("Godfater", ["127"]),
        ("Fagro", ["100"]),
        ("Lebowski", ["902"]),
        ("Star Wras, Fargoo", ["50", "100"]),
        ("toy storey (1995)", ["1"]),
        ("se7en, seven", ["11", "11"]),
        ("Il Postino, postino", ["14", "14"]),
        ("cite des enfants perdus, the city of lost children", ["90", "90"]),
        ('"x,y"', ["x,y"]),
        ("dolls and boys", ["x,y"]),
        ("sabrina (1954)", ["486"]),
        ("Good, the Bad and the Ugly, Fargo", ["177", "100"]),
        ("The Good, the Bad and the Ugly", ["177"]),
        ("", []),
        (" , ", []),
    ],
)
def test_a_title_is_found_in_about_its_words(text: str, found: list[str]) -> None:
    assert find_items(text, CATALOGUE) == found


def test_an_id_is_taken_before_a_title() -> None:
    assert find_items("1984", CATALOGUE) == ["1984"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chasing amy", r"'chasing amy' may be Chasing Amy \(1997\) \[246\] or .* \[268\]; give"),
        ("Sabrina", r"'Sabrina' may be Sabrina \(1995\) \[274\] or Sabrina \(1954\) \[486\]"),
        ("sabrnia", r"'sabrnia' may be .*274.*486"),
        ("Fargo, wars", r"no item 'wars' .*did you mean Star Wars \(1977\) \[50\]"),
        ("Sabrina (1970)", r"no item .*did you mean Sabrina \(1995\) \[274\]"),
        ("Toy Story 2", r"no item 'Toy Story 2' .*did you mean Toy Story \(1995\) \[1\]"),
        ("The Godfather Part III", r"no item .*did you mean .*Godfather"),
        ("qqqqqqqqqq", "no item 'qqqqqqqqqq' in the catalogue of 18 items .*no title is near it"),
        ("???", r"no item '\?\?\?' "),
    ],
)
def test_a_name_of_no_item_or_of_several_is_answered_with_the_nearest(
    text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        find_items(text, CATALOGUE)


def test_a_message_holds_no_escape_sequence_of_a_title() -> None:
    with pytest.raises(DataError) as failure:
        find_items("desert", CATALOGUE)
    assert "Red" in str(failure.value)
    assert "\x1b" not in str(failure.value)


@given(st.text())
def test_any_text_is_found_or_refused(text: str) -> None:
    found: list[str] = []
    with contextlib.suppress(DataError):
        found = find_items(text, CATALOGUE)
    assert set(found) <= set(FILMS)


@given(st.sampled_from([i for i in FILMS if i not in ("246", "268", "b")]))
def test_every_quoted_title_is_found_as_it_stands_in_the_catalogue(item: str) -> None:
    assert find_items(f'"{FILMS[item]}"', CATALOGUE) == [item]


def test_a_year_is_that_of_the_title_or_of_a_field_of_its_own() -> None:
    fields = {
        "title": ("Sabrina", "Sabrina", "Fargo", "Heat"),
        "year": ("1954", "1995", "1996", ""),
    }
    catalogue = Catalogue(("s", "t", "f", "h"), fields)
    found = find_items("sabrina (1995), sabrina (1954), Fargo, Fargo (1996)", catalogue)
    assert found == ["t", "s", "f", "f"]
    assert find_items("heat (1995)", catalogue) == ["h"]  # nobody knows its year
    with pytest.raises(DataError, match=r"may be Sabrina \(1954\) \[s\] or Sabrina \(1995\) \[t\]"):
        find_items("sabrina", catalogue)
    with pytest.raises(DataError, match=r"no item .* did you mean Fargo \(1996\) \[f\]"):
        find_items("fargo (1997)", catalogue)


def test_an_id_that_reads_like_an_article_stays_an_id() -> None:
    catalogue = Catalogue(("a", "b", "la"), {"title": ("Up", "Her", "Them")})
    assert find_items("b, a, la", catalogue) == ["b", "a", "la"]


def test_an_id_may_hold_commas() -> None:
    catalogue = Catalogue(("k,l", "c, d", "e"), {"title": ("One", "Two", "Three")})
    assert find_items("k,l", catalogue) == ["k,l"]
    assert find_items('e, k,l, "c, d", Two', catalogue) == ["e", "k,l", "c, d", "c, d"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("godfather", ["127", "187"]),
        ("the godf", ["127", "187"]),
        ("godfathr", ["127", "187"]),
        ("par", ["187"]),
        ("wars", ["50"]),
        ("star wras", ["50"]),
        ("sabrina", ["274", "486"]),
        ("sabrina (1954)", ["486"]),
        ("cité des enf", ["90"]),
        ("", []),
        ("?!", []),
        ("zzzzzz", []),
    ],
)
def test_a_search_gives_what_holds_the_words_and_what_looks_alike(
    text: str, found: list[str]
) -> None:
    assert TitleSearch(CATALOGUE).find(text) == found
    assert TitleSearch(CATALOGUE).find(text, 1) == found[:1]
