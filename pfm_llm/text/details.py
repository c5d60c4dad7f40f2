"""The fields of a catalogue that describe its items beside the title.

Data come with columns of all kinds. A field describes an item if people would read it: words or a
year, no link, no number, no key.
"""

import re
from collections.abc import Sequence

from pfm_llm.data.interactions import TITLE, Catalogue

_LINK = re.compile(r"\w+://|www\.|[\w-]+\.(?:jpe?g|png|gif|webp)$", re.IGNORECASE)
_NUMBER = re.compile(r"[-+$€£]?[\d.,:%/-]*\d[\d.,:%/-]*")
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d(?:\.0)?")
_KEY = re.compile(r"(?=.*\d)[A-Za-z0-9_-]{6,}")
_MOSTLY = 0.8
_SAMPLE = 2000


def detail_fields(catalogue: Catalogue) -> tuple[str, ...]:
    """Names of the fields that describe the items, shortest texts first; without the title.

    The shortest come first because a text is cut to a number of tokens: a long description must
    not push out the category.
    """
    lengths = {}
    for name, values in catalogue.fields.items():
        known = [value for value in values[:_SAMPLE] if value]
        if name != TITLE and known and _describes(known):
            lengths[name] = sum(map(len, known)) / len(known)
    return tuple(sorted(lengths, key=lambda name: lengths[name]))


def details(catalogue: Catalogue) -> list[str]:
    """The text of ``{details}`` of every item: its describing fields, joined by commas."""
    names = detail_fields(catalogue)
    columns = [catalogue.fields[name] for name in names]
    return [
        ", ".join(dict.fromkeys(filter(None, values))) for values in zip(*columns, strict=True)
    ] or [""] * len(catalogue)


def _describes(known: Sequence[str]) -> bool:
    def share(pattern: re.Pattern[str]) -> float:
        return sum(bool(pattern.fullmatch(value.strip())) for value in known) / len(known)

    if share(_YEAR) > _MOSTLY:
        return True
    links = sum(bool(_LINK.search(value)) for value in known) / len(known)
    return max(share(_NUMBER), share(_KEY), links) <= 1 - _MOSTLY
