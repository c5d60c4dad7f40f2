"""Items of a catalogue by what a person types: an id, a title, or a part of a title."""

import difflib
from collections import Counter

from pfm_llm.base.errors import DataError
from pfm_llm.data.interactions import Catalogue

_NAMED = 5
_NEAR, _TYPO = 0.5, 0.8  # similarities of `difflib`: to be named, to be meant


def find_items(catalogue: Catalogue, wanted: str) -> list[str]:
    """The external ids of items that are named in one line, with commas between them.

    A name is an item's id, its title, a part of the title that no other title has, or a title
    with a typo; case does not matter. A title may hold commas.

    Raises:
        DataError: Nothing has that name, or several items have it. The message lists some.
    """
    ids, by_title = set(catalogue.item_ids), _unique_titles(catalogue)
    parts = [part.strip() for part in wanted.split(",")]
    found, start = [], 0
    while start < len(parts):
        # The longest stretch first: "Good, the Bad and the Ugly, The" is one title.
        for end in range(len(parts), start, -1):
            name = ", ".join(parts[start:end])
            item = name if name in ids else by_title.get(name.casefold())
            if item is not None:
                break
        else:
            name, end = parts[start], start + 1
            item = _by_part(catalogue, name) if name else None
        if item is not None:
            found.append(item)
        start = end
    return found


def _unique_titles(catalogue: Catalogue) -> dict[str, str]:
    """Folded title to id, for the titles that a single item has."""
    folded = [title.casefold() for title in catalogue.fields["title"]]
    counts = Counter(folded)
    return {t: i for t, i in zip(folded, catalogue.item_ids, strict=True) if counts[t] == 1}


def _by_part(catalogue: Catalogue, name: str) -> str:
    titles = catalogue.fields["title"]
    having = [i for i, title in enumerate(titles) if name.casefold() in title.casefold()]
    if len(having) == 1:
        return catalogue.item_ids[having[0]]
    if having:
        some = "; ".join(f"{titles[i]} [{catalogue.item_ids[i]}]" for i in having[:_NAMED])
        raise DataError(f"{len(having)} items have {name!r} in their title, such as {some}")
    folded = {title.casefold(): title for title in titles}
    typo = difflib.get_close_matches(name.casefold(), folded, 2, cutoff=_TYPO)
    if len(typo) == 1:
        return catalogue.item_ids[titles.index(folded[typo[0]])]
    near = difflib.get_close_matches(name.casefold(), folded, _NAMED, cutoff=_NEAR)
    there = "; ".join(folded[one] for one in near) or "; ".join(titles[:3])
    raise DataError(f"no item {name!r} in the catalogue; there are {there}")
