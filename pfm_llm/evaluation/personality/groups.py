"""Groups of users: deciles, age bands and other fields, as labels for the names of figures."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.metrics import FloatArray

UNKNOWN = "unknown"
OTHER = "other"

_SIGNS = {"+": "plus", "<": "under", ">": "over"}  # without them bands would coincide
_AGE_BANDS = (
    (18, "under 18"),
    (25, "18-24"),
    (35, "25-34"),
    (45, "35-44"),
    (50, "45-49"),
    (56, "50-55"),
    (math.inf, "56+"),
)


def deciles(values: FloatArray) -> list[str]:
    """The decile of each user: ``"1"`` holds the lowest values, ``"10"`` the highest.

    A user's decile is 1 + floor(10 · share of users with a lower value). Equal values are thus in
    one decile, whatever the order of the users, and many equal values make it larger and leave
    the next ones empty.

    Args:
        values: float64 [U]; NaN if unknown.

    Returns:
        A label per user, `UNKNOWN` for NaN.

    Raises:
        DataError: ``values`` is not one-dimensional.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise DataError(f"values of shape {values.shape}: give one per user")
    known = np.sort(values[~np.isnan(values)])
    num_lower = np.searchsorted(known, values, side="left")
    return [
        UNKNOWN if math.isnan(value) else str(10 * int(lower) // len(known) + 1)
        for value, lower in zip(values.tolist(), num_lower, strict=True)
    ]


def age_band(age: str) -> str:
    """The band of an age: ``under 18``, ``18-24``, ``25-34``, … ``50-55`` or ``56+``.

    These are the bands of MovieLens-1M, so the figures of the two data sets compare.

    Args:
        age: In years. A text that is no number, such as a band, is returned unchanged.

    Returns:
        The band; `UNKNOWN` for an empty text and for numbers that cannot be an age.
    """
    try:
        years = float(age)
    except ValueError:
        return age.strip() or UNKNOWN
    if not 0 <= years < math.inf:
        return UNKNOWN
    return next(band for limit, band in _AGE_BANDS if years < limit)


def slug(label: str) -> str:
    """A label made of ``a-z``, ``0-9`` and ``_`` alone, for the name of a figure.

    Accents are dropped, ``56+`` becomes ``56_plus``, letters of other scripts their code points;
    an empty label is `UNKNOWN`.
    """
    text = unicodedata.normalize("NFKD", label).lower()
    for sign, word in _SIGNS.items():
        text = text.replace(sign, f" {word} ")
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\w", lambda c: c[0] if c[0].isascii() else f"u{ord(c[0]):x}", text)
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_") or UNKNOWN


def user_groupings(
    quality: FloatArray, activity: FloatArray, fields: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """The groupings for the measure of harm.

    Args:
        quality: float64 [U], quality of the shared adapter alone on validation; NaN where there
            is none. Decile 1 is the worst served.
        activity: float64 [U], number of train interactions. Decile 1 is the least active.
        fields: Name to [U] values, such as ``age``, ``gender`` and ``occupation``; ``""`` where
            unknown. ``age`` is put into bands.

    Returns:
        Name to a label per user: ``quality_decile``, ``activity_decile``, and the fields.

    Raises:
        DataError: An array is not one-dimensional, or a field takes the name of a decile.
    """
    groupings = {"quality_decile": deciles(quality), "activity_decile": deciles(activity)}
    for name, values in fields.items():
        if name in groupings:
            raise DataError(f"user field {name!r}: this name is taken; rename the field")
        groupings[name] = [age_band(v) for v in values] if name == "age" else list(values)
    return groupings


def members(labels: Sequence[str], min_users: int) -> dict[str, np.ndarray]:
    """The users of each group; small groups are merged.

    Args:
        labels: [U], any text; equal slugs are one group.
        min_users: Smaller groups are merged into `OTHER`. If that is still smaller, it is left
            out: an interval over a few users means nothing and could reveal single persons.

    Returns:
        Slug to the positions of its users, int64 [users of the group], in order of the first
        number in the slug, then of the text.
    """
    slugs = np.array([slug(label) for label in labels], dtype=np.str_)
    names, counts = np.unique(slugs, return_counts=True)
    small = names[counts < min_users]
    merged = np.where(np.isin(slugs, small), OTHER, slugs)
    groups = {name: np.flatnonzero(merged == name) for name in np.unique(merged).tolist()}
    return {
        name: groups[name]
        for name in sorted(groups, key=_natural)
        if len(groups[name]) >= min_users
    }


def _natural(name: str) -> tuple[float, bool, str]:
    number = re.search(r"\d+", name)
    return (int(number[0]) if number else math.inf, not name.startswith("under"), name)
