"""Items by what people type: an id, or a title in about the words of the catalogue."""

import csv
import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from pfm_llm.base.errors import DataError
from pfm_llm.base.terminal import harmless
from pfm_llm.data.interactions import TITLE, Catalogue

_LEADING = {"the", "a", "an"}
_TRAILING = _LEADING | {"der", "die", "das", "le", "la", "les", "el", "los", "las", "il", "lo"}
_YEAR = re.compile(r"\s*\(((?:1[89]|20)\d\d)\)\s*$")
_BRACKETS = re.compile(r"\(([^()]*)\)")
_NUMBER = re.compile(r"\d+|i{2,3}|iv|vi{0,3}|ix|x")
_SMALL_TYPO = 0.8  # of `difflib`: two letters of five that changed places
_CLEARLY = 0.05
_NEAR = 0.5
_LIKE = 0.6  # for a list to choose from, where a wrong title costs a glance
_MOST_NAMED = 3


def find_items(text: str, catalogue: Catalogue) -> list[str]:
    """The items that a comma-separated line names.

    An id is taken before a title. Of a title, case, accents, punctuation, the article, the year
    and small typos are forgiven; a number is not, since it may be that of a sequel. A name that
    holds a comma may stand in double quotes; a title is understood without them.

    Args:
        text: Ids or titles.
        catalogue: The items.

    Returns:
        External ids, in the order of the text; none for an empty text.

    Raises:
        DataError: A name is of no item, or of several; the message names the nearest titles.
    """
    ids = set(catalogue.item_ids)
    names, index = _names(text, ids), _Index(catalogue)
    found: list[str] = []
    start = 0
    while start < len(names):
        # The longest stretch first: "The Good, the Bad and the Ugly" is one title.
        for end in range(len(names), start, -1):
            name = ", ".join(names[start:end])
            bare = ",".join(names[start:end])  # an id may hold a comma too
            item = next((text for text in (name, bare) if text in ids), None) or index.exactly(name)
            if item is not None:
                break
        else:
            name, end = names[start], start + 1
            item = index.nearly(name)
        found.append(item)
        start = end
    return found


def _names(text: str, ids: Collection[str]) -> list[str]:
    """The parts between commas; an article after a comma belongs to the title before it."""
    try:
        [parts] = csv.reader([" ".join(text.split())], skipinitialspace=True)
    except csv.Error as error:
        raise DataError(f"the items cannot be told apart: {error}") from error
    names: list[str] = []
    for part in filter(None, map(str.strip, parts)):
        is_article = _YEAR.sub("", part).strip().casefold() in _TRAILING and part not in ids
        if names and is_article:
            names[-1] += f", {part}"
        else:
            names.append(part)
    return names


class TitleSearch:
    """Finds items while a title is typed; typos are forgiven.

    Args:
        catalogue: The items.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._index = _Index(catalogue)

    def find(self, text: str, most: int = 10) -> list[str]:
        """External ids, the best match first; none for a text without a letter or digit.

        First come titles of exactly these words, then those that hold them (of the last word its
        beginning will do), then those that look alike.
        """
        return self._index.search(text, most)


class _Index:
    """The titles of a catalogue by their words."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._ids, self._titles = catalogue.item_ids, catalogue.fields[TITLE]
        self._years = list(catalogue.fields.get("year", [""] * len(catalogue)))
        self._items: dict[str, set[int]] = defaultdict(set)
        for item, title in enumerate(self._titles):
            keys, year = _keys(title)
            self._years[item] = year or self._years[item]
            for words in keys:
                self._items[words].add(item)

    def exactly(self, name: str) -> str | None:
        """The id of the item with this title; None where no item has it.

        Raises:
            DataError: Several items have it.
        """
        return self._single(name, self._of(*_keys(name)))

    def nearly(self, name: str) -> str:
        """The id of the item whose title is a small typo away.

        Raises:
            DataError: There is none, or there are several.
        """
        keys, year = _keys(name)
        item = self._single(name, self._alike(keys, year))
        if item is not None:
            return item
        near = self._near(keys)
        hint = f"did you mean {self._named(near)}" if near else "no title is near it"
        some = ", ".join(self._ids[:_MOST_NAMED])
        raise DataError(
            f"no item {name!r} in the catalogue of {len(self._ids)} items ({some}, …); {hint}; "
            "give ids or titles, in double quotes where they hold a comma"
        )

    def search(self, text: str, most: int) -> list[str]:
        """See `TitleSearch.find`."""
        keys, year = _keys(text)
        if not keys:
            return []
        words = keys[0]
        holding = [title for title in self._items if f" {words}" in f" {title}"]
        holding.sort(key=lambda title: (title != words, not title.startswith(words), len(title)))
        alike = difflib.get_close_matches(words, self._items, most, _LIKE)
        items = (item for title in holding + alike for item in sorted(self._of([title], year)))
        return [self._ids[item] for item in dict.fromkeys(items)][:most]

    def _single(self, name: str, items: Collection[int]) -> str | None:
        if len(items) > 1:
            raise DataError(f"{name!r} may be {self._named(sorted(items))}; give the id")
        return next((self._ids[item] for item in items), None)

    def _of(self, keys: Iterable[str], year: str) -> set[int]:
        """Items with one of these titles, of this year where both years are known."""
        items = {item for words in keys for item in self._items.get(words, ())}
        return {item for item in items if not year or self._years[item] in ("", year)}

    def _alike(self, keys: Iterable[str], year: str) -> set[int]:
        """Items whose title is a small typo away; several where none is clearly nearest."""
        best: dict[int, float] = defaultdict(float)
        for words in keys:
            alike = [
                other
                for other in self._items
                if _numbers(other) == _numbers(words) and self._of([other], year)
            ]
            for other in difflib.get_close_matches(words, alike, _MOST_NAMED, _SMALL_TYPO):
                ratio = difflib.SequenceMatcher(None, other, words).ratio()
                for item in self._of([other], year):
                    best[item] = max(best[item], ratio)
        bar = max(best.values(), default=0.0) - _CLEARLY
        return {item for item, ratio in best.items() if ratio > bar}

    def _near(self, keys: Sequence[str]) -> list[int]:
        """For a hint: titles that hold the words first, then those that look alike."""
        titles = sorted(self._items)
        found: list[str] = []
        for words in keys[:1]:
            found += [title for title in titles if f" {words} " in f" {title} "]
            found += difflib.get_close_matches(words, titles, _MOST_NAMED, _NEAR)
        items = (item for title in found for item in sorted(self._items[title]))
        return list(dict.fromkeys(items))[:_MOST_NAMED]

    def _named(self, items: Iterable[int]) -> str:
        shown = [self._shown(item) for item in items]
        rest = [f"{len(shown) - _MOST_NAMED} more"] if len(shown) > _MOST_NAMED else []
        return " or ".join([*shown[:_MOST_NAMED], *rest])

    def _shown(self, item: int) -> str:
        title, year = harmless(self._titles[item]), self._years[item]
        dated = f" ({harmless(year)})" if year and year not in title else ""
        return f"{title}{dated} [{self._ids[item]}]"


def _keys(title: str) -> tuple[list[str], str]:
    """The ways to write a title, whole and each part in and before its brackets; and its year."""
    dated = _YEAR.search(title)
    title = _YEAR.sub("", title)
    parts = [title, _BRACKETS.sub(" ", title), *_BRACKETS.findall(title)]
    words = dict.fromkeys(way for part in parts for way in _ways(part) if way)
    return list(words), dated[1] if dated else ""


def _ways(title: str) -> list[str]:
    """The words of a title with the article where it belongs, and without it."""
    before, comma, article = title.rpartition(",")
    if comma and article.strip().casefold() in _TRAILING:
        return [_words(f"{article} {before}"), _words(before)]
    words = _words(title)
    first, _, rest = words.partition(" ")
    return [rest if rest and first in _LEADING else words]


def _words(text: str) -> str:
    """Letters and digits in lower case, without accents; one space between words."""
    plain = unicodedata.normalize("NFKD", text.casefold().replace("&", " and "))
    letters = "".join(c for c in plain if not unicodedata.combining(c)).replace("'", "")
    return " ".join(re.findall(r"[^\W_]+", letters))


def _numbers(words: str) -> list[str]:
    """The numbers in a title, Roman ones too."""
    return [word for word in words.split() if _NUMBER.fullmatch(word)]
