"""Figures in Markdown prose, compared with the claims that stand beside them.

A sentence names its figures in a comment at its end, in their order::

    The private part adds 0.0139 NDCG@10 [0.0050, 0.0223]. <!-- claim: gain.films.ndcg -->

Looked at is all but generated tables, code, comments and the targets of links. A figure is a number
with a decimal point, with an interval, or with %, × or x. A plain whole number is one only where a
claim has that value. Settings stand in code (`0.4`) and are no figures.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scripts.update_claims import Claim

_GENERATED = re.compile(
    r"<!-- (?:table|suite|claims|first): .*?<!-- end of (?:table|first) -->", re.DOTALL
)
_CODE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_CLAIM = re.compile(r"<!-- claim: ([^>]+?) -->")
_COMMENT = re.compile(r"<!--(?! claim: ).*?-->", re.DOTALL)
_INLINE = re.compile(r"`[^`]*`|\]\([^)]*\)|<https?:[^>]*>")
_BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\.)\s)|\n(?=\|)")
_EXEMPT = re.compile(r"Python 3\.\d+|arXiv[: ]\d+\.\d+|95 %")

_NUMBER = r"[+−-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
_FIGURE = re.compile(
    rf"(?<![\w.,@])(?<!\w-)(?P<value>{_NUMBER})(?!\.?\d)(?:\s?(?P<unit>%|×|x\b)|(?!\w))"
    # "0.1 [0, 0.2]", or with a word such as NDCG@10 between the two
    rf"(?:(?:\s[A-Za-z][\w@-]*)?\s\[(?P<low>{_NUMBER}),\s(?P<high>{_NUMBER})\])?"
)


@dataclass(frozen=True)
class Figure:
    """A number in a sentence.

    Attributes:
        text: As written.
        value: Its digits.
        low: Lower end of its interval, as written; None without one.
        high: Upper end of it.
        unit: ``%``, ``×``, ``x`` or empty.
    """

    text: str
    value: str
    low: str | None
    high: str | None
    unit: str

    @property
    def needs_claim(self) -> bool:
        """Whether it may not stand without a claim."""
        return "." in self.value or bool(self.unit) or self.low is not None

    def shows(self, claim: Claim) -> bool:
        """Whether it is the claim's value, and its interval, at the precision that it is given."""
        if not self.needs_claim:
            return float(self.value.replace(",", "")) == claim.value
        factor = 100 if self.unit == "%" else 1
        pairs = [(self.value, claim.value), (self.low, claim.ci_low), (self.high, claim.ci_high)]
        return all(
            exact is not None and _equal(written, exact * factor)
            for written, exact in pairs
            if written is not None
        )


def figures(text: str) -> list[Figure]:
    """All numbers of a stretch of prose."""
    return [
        Figure(m[0], m["value"], m["low"], m["high"], m["unit"] or "")
        for m in _FIGURE.finditer(_EXEMPT.sub("", text))
    ]


def wrong_figures(markdown: str, claims: Mapping[str, Claim]) -> list[str]:
    """One line for each figure that no claim stands beside, and for each claim that is not met.

    Args:
        markdown: A document.
        claims: Id to claim.
    """
    return [line for text, ids in _stretches(markdown) for line in _compare(text, ids, claims)]


def claimed_ids(markdown: str) -> list[str]:
    """All ids that a document names, generated tables and code left out."""
    return [name for _, ids in _stretches(markdown) for name in ids]


def _stretches(markdown: str) -> Iterator[tuple[str, list[str]]]:
    """Each stretch of prose up to a claim comment or the end of its block, with the ids."""
    text = _CODE.sub("\n\n", _GENERATED.sub("\n\n", markdown))
    text = _INLINE.sub(" ", _COMMENT.sub(" ", text))
    for block in _BLOCK.split(text):
        parts = _CLAIM.split(block)
        for prose, ids in zip(parts[::2], [*parts[1::2], ""], strict=True):
            yield prose, re.split(r"[,\s]+", ids.strip()) if ids else []


def _compare(text: str, ids: Sequence[str], claims: Mapping[str, Claim]) -> Iterator[str]:
    words = " ".join(text.split())
    left = figures(words)
    for name in ids:
        if name not in claims:
            yield f"there is no claim {name}, named beside: {words}"
            continue
        claim = claims[name]
        found = next((place for place, figure in enumerate(left) if figure.shows(claim)), None)
        if found is None:
            shown = f"{claim.value} [{claim.ci_low}, {claim.ci_high}]"
            yield f"{name} is {shown}, which is not in: {words}"
        else:
            yield from _unclaimed(left[:found], words)
            left = left[found + 1 :]
    yield from _unclaimed(left, words)


def _unclaimed(left: Sequence[Figure], words: str) -> Iterator[str]:
    for figure in left:
        if figure.needs_claim:
            yield f"no claim stands beside {figure.text!r} in: {words}"


def _equal(written: str, exact: float) -> bool:
    digits = written.replace(",", "").replace("−", "-")
    decimals = len(digits.partition(".")[2])
    return float(digits) == float(f"{exact:.{decimals}f}")
