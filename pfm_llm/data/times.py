"""Columns of times: Unix times of any unit, dates, or any numbers that rise with time."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from pfm_llm.base.errors import DataError

Number = int | float

_MAX_INTEGER = 2**63
_YEAR_1973, _YEAR_2100 = 100_000_000, 4_102_444_800  # as Unix seconds
_PER_SECOND = {
    "seconds": 1,
    "milliseconds": 10**3,
    "microseconds": 10**6,
    "nanoseconds": 10**9,
}
DATES, NUMBERS = "dates", "numbers"
_CALENDAR = {"decimal years": (1900, 2101), "days": (15_000, 80_000)}
"""Small numbers that stand for times too: years, and days as a spreadsheet counts them."""

_FRACTION = re.compile(r"(:\d\d)[.,](\d+)")
_COMMA = re.compile(r"[+-]?\d+,(\d+)")
_THOUSAND = 3  # digits
_YEAR_FIRST = re.compile(r"^(\d{4})([/.])(\d\d?)\2(\d\d?)(?!\d)")
_YEAR_LAST = re.compile(r"^(\d\d?)([/.-])(\d\d?)\2(\d{4})(?:(?:,? +|T)(\d\d?)(:.+))?$")
_NOON = re.compile(r"(?<=\d)(?=[AaPp][Mm]$)")  # before AM or PM without a blank
_MONTHS = 12
_FEWEST_USERS = 2
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NANO = 10**9
_FORMATS = (
    *("%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z"),
    *("%Y-%m-%d %I:%M:%S %p", "%Y-%m-%d %I:%M %p"),
    *("%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%d-%b-%Y"),
)
"""As in Goodreads, e-mail, MIND once the year is first, and with the name of the month."""


@dataclass(frozen=True)
class Times:
    """A parsed column of times.

    Attributes:
        values: One for each row, None for a text that is no time. Dates are in seconds since 1970,
            or in nanoseconds if seconds as floats would not tell them apart.
        unit: The unit in which most values are: one of seconds to nanoseconds since 1970,
            ``dates``, or ``numbers`` of an unknown unit.
        per_second: How many of the values make a second; None where the unit is unknown.
        odd: Rows whose unit differs from that of most.
        day_first: Whether dates such as 13/02/2020 begin with the day; None if there are none, or
            if nothing tells.
        unclear: Rows that leave open whether dates begin with the day or the month: one that may
            begin with either, or one that begins with the day and one that begins with the month.
    """

    values: list[Number | None]
    unit: str
    per_second: int | None
    odd: frozenset[int] = frozenset()
    day_first: bool | None = None
    unclear: tuple[int, ...] = ()


def parse_times(texts: Sequence[str], day_first: bool | None = None) -> Times:
    """Parse a column of times.

    A column in which some values are surely of another unit than others, such as seconds and
    milliseconds, has no order. The rows of the rarer units are then odd.

    Dates that begin with the day or the month have one order in a column. A number above 12 tells
    it. If none does, a row is unclear; if two contradict each other, both are.

    Args:
        texts: Numbers, or dates such as ISO 8601 (without a zone: UTC).
        day_first: Whether 01/02/2020 is the first of February; None: the column tells.
    """
    numbers = parse_numbers(texts)
    unclear: tuple[int, ...] = ()
    if day_first is None:
        day_first, unclear = _day_order(texts)
    is_day_first = bool(day_first)
    dates = {
        row: moment
        for row, (text, value) in enumerate(zip(texts, numbers, strict=True))
        if value is None and (moment := _nanoseconds(text, is_day_first)) is not None
    }
    has_numbers = any(value is not None for value in numbers)
    is_fine = not has_numbers and any(moment % 1000 for moment in dates.values())
    values: list[Number | None] = list(numbers)
    for row, moment in dates.items():
        whole = moment % _NANO == 0 and not is_fine
        values[row] = moment if is_fine else moment // _NANO if whole else moment / _NANO
    units = [
        DATES if row in dates else None if value is None or value <= 0 else unit_of(value)
        for row, value in enumerate(numbers)
    ]
    unit = _commonest(units)
    fits = {unit, None}
    if {DATES, "seconds"} & fits and not is_fine:
        fits |= {DATES, "seconds"}
    known = {name for name in units if name is not None}
    is_mixed = not known <= fits and _are_mixed(known)
    odd = [row for row, name in enumerate(units) if is_mixed and name not in fits]
    per_second = (_NANO if is_fine else 1) if unit == DATES else _PER_SECOND.get(unit)
    if not is_mixed and not known <= fits:  # numbers of no clear unit, such as those before 1973
        unit, per_second = NUMBERS, None
    return Times(values, unit, per_second, frozenset(odd), day_first, unclear)


def _day_order(texts: Sequence[str]) -> tuple[bool | None, tuple[int, ...]]:
    """Whether dates begin with the day, and the rows that leave it open."""
    open_rows, day_rows, month_rows = [], [], []
    for row, text in enumerate(texts):
        if (match := _YEAR_LAST.match(text)) is None:
            continue
        first, second = int(match[1]), int(match[3])
        if first > _MONTHS >= second:
            day_rows.append(row)
        elif second > _MONTHS >= first:
            month_rows.append(row)
        elif first != second:
            open_rows.append(row)
    if day_rows and month_rows:
        return None, (day_rows[0], month_rows[0])
    if day_rows or month_rows:
        return bool(day_rows), ()
    return None, tuple(open_rows[:1])


def unit_of(value: Number) -> str:
    """The unit in which a number is a time between 1973 and 2100; `NUMBERS` where none is clear."""
    for unit, factor in _PER_SECOND.items():
        if _YEAR_1973 * factor <= value < _YEAR_2100 * factor:
            return unit
    for unit, (first, last) in _CALENDAR.items():
        if first <= value < last:
            return unit
    return NUMBERS


def parse_numbers(texts: Sequence[str]) -> list[Number | None]:
    """Finite numbers, ints where they are whole; None for another text.

    Commas are decimal ones if no text has a point, and if they cannot all stand before thousands.
    """
    commas = [match[1] for text in texts if (match := _COMMA.fullmatch(text))]
    is_decimal = not any("." in text for text in texts)
    if is_decimal and any(len(digits) != _THOUSAND for digits in commas):
        texts = [text.replace(",", ".") if _COMMA.fullmatch(text) else text for text in texts]
    return [_number(text) for text in texts]


def _number(text: str) -> Number | None:
    try:
        value: Number = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            return None
        if not math.isfinite(value):
            return None
        if value.is_integer():
            value = int(value)
    return value if abs(value) < _MAX_INTEGER else None


def _are_mixed(units: set[str]) -> bool:
    """Whether units exclude each other; numbers of an unknown unit may be a count of anything."""
    exact = units & {*_PER_SECOND, DATES}
    if DATES in units:
        return bool(units - {DATES, "seconds"})
    return NUMBERS not in units and bool(exact) and len(units) > 1


def _commonest(units: Sequence[str | None]) -> str:
    counts = Counter(unit for unit in units if unit is not None)
    return counts.most_common(1)[0][0] if counts else NUMBERS


def shared_clock(times: np.ndarray | None, offsets: np.ndarray) -> np.ndarray:
    """The times, if they are a clock that all users share and no order within each user.

    They are an order if more than half of the users with two events or more begin at the earliest
    time of all and count on from it by one. Of a single user nobody can tell.

    Args:
        times: Ascending within each user, int64 or float64 [num_events]; None: there are none.
        offsets: Where each user's events begin, and the end, int64 [num_users + 1].

    Raises:
        DataError: There are none, or they are an order.
    """
    if times is None:
        raise DataError(
            "data.split: global_temporal needs timestamps and the source has none; set "
            "data.columns.timestamp, or use data.split: leave_last_out or last_fraction"
        )
    lengths = np.diff(offsets)
    several = lengths > 1
    if several.sum() < _FEWEST_USERS:
        return times
    first, last = times[offsets[:-1][several]], times[offsets[1:][several] - 1]
    counts_on = (first == first.min()) & (last - first == lengths[several] - 1)
    if 2 * counts_on.sum() > several.sum():
        raise DataError(
            "data.split: global_temporal needs a clock that all users share, and these times are "
            f"an order within each user: {counts_on.sum():,} of {several.sum():,} users begin at "
            f"{first.min()} and count on by one; name a column of real times in "
            "data.columns.timestamp, or use data.split: leave_last_out or last_fraction"
        )
    return times


def _nanoseconds(text: str, day_first: bool) -> int | None:
    """A date in nanoseconds since 1970."""
    digits = "0"
    found = _FRACTION.search(text)
    if found is not None:  # datetime has microseconds only
        digits = found[2][:9]
        text = text[: found.start()] + found[1] + text[found.end() :]
    moment = _date(text, day_first)
    if moment is None:
        return None
    whole = (moment - _EPOCH) // timedelta(microseconds=1) * 1000
    return whole + int(digits.ljust(9, "0"))


def _date(text: str, day_first: bool) -> datetime | None:
    if (match := _YEAR_LAST.match(text)) is not None:
        day, month = (match[1], match[3]) if day_first else (match[3], match[1])
        clock = f" {match[5]:>02}{_NOON.sub(' ', match[6])}" if match[5] else ""
        text = f"{match[4]}-{month:>02}-{day:>02}{clock}"
    iso = _YEAR_FIRST.sub(lambda m: f"{m[1]}-{m[3]:>02}-{m[4]:>02}", text).removesuffix(" UTC")
    moment = None
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        for form in _FORMATS:
            try:
                moment = datetime.strptime(text, form)
                break
            except ValueError:
                continue
    if moment is None:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
