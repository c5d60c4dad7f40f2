"""Times: every unit and date at full resolution, and no two units in one column."""

import itertools
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import ColumnsConfig, DataConfig
from pfm_llm.data.arrow import from_arrow, to_arrow
from pfm_llm.data.interactions import Interactions, build_interactions
from pfm_llm.data.report import LoadReport
from pfm_llm.data.rows import OTHER_UNIT, validate
from pfm_llm.data.splits import split_interactions
from pfm_llm.data.tables import SourceTables, Table
from pfm_llm.data.times import DATES, NUMBERS, Number, parse_times

SECONDS = 1_500_000_000


def built(times: list[str], **settings: object) -> tuple[Interactions, LoadReport]:
    """One user who meets an item at each of these times."""
    names = [f"i{n}" for n in range(len(times))]
    columns = {
        "user_id": ["u"] * len(times), "item_id": names, "timestamp": times, "title": names,
    }  # fmt: skip
    table = Table("rows.csv", tuple(columns), columns, range(2, len(times) + 2))
    config = DataConfig.model_validate({"min_interactions": 1, "max_bad_rows": 0.9, **settings})
    raw = validate(SourceTables(table), ColumnsConfig(), config.max_bad_rows, config.day_first)
    return build_interactions(raw, config, seed=0)


@pytest.mark.parametrize(
    ("texts", "values", "unit", "per_second"),
    [
        (["1", "3.0", "2"], [1, 3, 2], NUMBERS, None),
        ([f"{SECONDS}", "0", "-1"], [SECONDS, 0, -1], "seconds", 1),
        ([f"{SECONDS}000"], [SECONDS * 1000], "milliseconds", 1000),
        ([f"{SECONDS}000001"], [SECONDS * 10**6 + 1], "microseconds", 10**6),
        ([f"{SECONDS}000000001"], [SECONDS * 10**9 + 1], "nanoseconds", 10**9),
        ([f"{SECONDS}.25"], [SECONDS + 0.25], "seconds", 1),
        (["45321.25", "45321.5"], [45321.25, 45321.5], "days", None),
        (["2019.25"], [2019.25], "decimal years", None),
        (["1970-01-02", "1970-01-01T00:00:01Z"], [86_400, 1], DATES, 1),
        (["1970/1/2 00:00:01 UTC"], [86_401], DATES, 1),
        (["1970.01.02", "1970.1.2 00:00:01"], [86_400, 86_401], DATES, 1),
        (["1970.01/02", "01/02-1970", "1970.01.021"], [None] * 3, NUMBERS, None),
        (["1970-01-01 00:00:01.000001", "1970-01-01"], [1.000001, 0], DATES, 1),
        (["1970-01-01 00:00:01.000000001", "1970-01-01"], [10**9 + 1, 0], DATES, 10**9),
        (["Thu Jan 01 00:00:02 +0000 1970"], [2], DATES, 1),
        (["1/1/1970 1:00:00 AM"], [3600], DATES, 1),
        (["2 Jan 1970", "January 3, 1970", "04-Jan-1970"], [86_400, 172_800, 259_200], DATES, 1),
        (["45321,25", "45321,125"], [45321.25, 45321.125], "days", None),
        (["1,234", "2,345"], [None, None], NUMBERS, None),
        (["soon", "", "nan", "2020-13-01"], [None] * 4, NUMBERS, None),
    ],
)
def test_units_and_dates(
    texts: list[str], values: list[Number | None], unit: str, per_second: int | None
) -> None:
    times = parse_times(texts)
    assert (times.values, times.unit, times.per_second) == (values, unit, per_second)
    assert times.odd == frozenset()


UNITS = [
    f"{SECONDS}", f"{SECONDS}000", f"{SECONDS}000000", f"{SECONDS}000000000", "45321.5", "2019.5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("most", "odd"),
    [
        *((a, b) for a, b in itertools.permutations(UNITS, 2) if {a, b} != {UNITS[4], UNITS[5]}),
        *(("2017-07-14", unit) for unit in UNITS[1:]),
        *((unit, "2017-07-14") for unit in UNITS[1:]),
        ("2017-07-14", "7"),
    ],
)
def test_a_rarer_unit_is_odd(most: str, odd: str) -> None:
    assert parse_times([most, odd, most, "-1" if most in UNITS else most]).odd == {1}


def test_a_count_that_passes_through_the_units_is_one_order() -> None:
    count = [str(10**n) for n in range(14)]
    assert parse_times(count).odd == frozenset()
    assert parse_times([f"{SECONDS}", "2017-07-14"]).odd == frozenset()


def test_rows_in_another_unit_are_bad_and_named() -> None:
    times = [str(SECONDS + n) for n in range(5)]
    _, report = built([*times[:2], f"{SECONDS}000", *times[2:]])
    assert report.dropped == {OTHER_UNIT: 1}
    assert report.examples == (f"rows.csv line 4: {OTHER_UNIT}: '{SECONDS}000' among seconds",)


@pytest.mark.parametrize(
    "times",
    [
        ["0.10", "0.25", "0.40", "0.85", "0.9"],
        ["45321.1", "45321.2", "45321.3", "45321.8", "45321.9"],
        ["2019.001", "2019.002", "2019.003", "2019.004", "2019.0041"],
        ["2020-01-01 00:00:00." + str(n) for n in range(1, 6)],
        ["2020-01-01 00:00:00.00000000" + str(n) for n in range(1, 6)],
    ],
)
@pytest.mark.parametrize("split", ["global_temporal", "leave_last_out", "last_fraction"])
def test_fractions_order_rows_and_put_cuts(times: list[str], split: str) -> None:
    """Five times are five places for a cut: the last two events are held out."""
    settings = {"split": split, "held_out": 0.4, "keep_ties": True}
    interactions, _ = built(times[::-1], **settings)
    assert [interactions.catalogue.item_ids[i] for i in interactions.items] == [
        "i4", "i3", "i2", "i1", "i0",
    ]  # fmt: skip
    divided = split_interactions(interactions, DataConfig.model_validate(settings))
    assert len(divided.train.interactions.items) == 3
    assert [len(part.targets[0]) for part in (divided.validation, divided.test)] == [1, 1]


def test_fractions_are_kept_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    interactions, report = built(["0.5", "0.25"])
    to_arrow(interactions, report, folder)
    again, _ = from_arrow(folder)
    assert again.timestamps is not None
    assert again.timestamps.tolist() == [0.25, 0.5]
    assert again.content_hash() == interactions.content_hash()


def test_ties_are_named_with_their_setting() -> None:
    _, report = built(["1", "1", "2"])
    assert report.notes[0] == (
        "1 rows share their time with the same user's row before: file order; data.keep_ties: true "
        "never cuts a history between them"
    )


@pytest.mark.parametrize(
    ("texts", "dates", "day_first"),
    [
        (["01/02/2020", "13/02/2020"], ["2020-02-01", "2020-02-13"], True),
        (["01/02/2020", "02/13/2020"], ["2020-01-02", "2020-02-13"], False),
        (["1.2.2020 8:05", "13.2.2020 23:00"], ["2020-02-01 08:05", "2020-02-13 23:00"], True),
        (["01-02-2020T10:00:00.5+01:00", "31-12-2020"], ["2020-02-01 09:00:00.5", "2020-12-31"],
         True),
        (["1/2/2020 8:36:57 PM", "1/20/2020, 1:00 AM"], ["2020-01-02 20:36:57", "2020-01-20 01:00"],
         False),
        (["03/03/2020", "1583193600"], ["2020-03-03", "2020-03-03"], None),
        (["2020-01-02", "2020/1/2"], ["2020-01-02", "2020-01-02"], None),
    ],
)  # fmt: skip
def test_a_number_above_twelve_tells_days_from_months(
    texts: list[str], dates: list[str], day_first: bool | None
) -> None:
    times = parse_times(texts)
    assert times.values == [datetime.fromisoformat(f"{d}+00:00").timestamp() for d in dates]
    assert (times.day_first, times.unclear) == (day_first, ())


def test_days_and_months_are_never_guessed() -> None:
    for clock in ("", " 1:05 PM", " 13:05", ", 1:05:03pm"):
        dates = [f"{date}{clock}" for date in ("01/01/2020", "01/02/2020")]
        with pytest.raises(DataError, match=r"line 3: '01/02/.* may .* data\.day_first: true"):
            built(dates)
        dates = [f"{date}{clock}" for date in ("01/01/2020", "13/02/2020", "02/14/2020")]
        with pytest.raises(
            DataError,
            match=r"line 3: '13/02/2020.* begins with the day, .* line 4: '02/14/2020.* with the "
            r"month, .* 'timestamp' do not tell; set data\.day_first: true",
        ):
            built(dates)
    day, _ = built(["01/01/2020", "01/02/2020"], day_first=True)
    month, _ = built(["01/01/2020", "01/02/2020"], day_first=False)
    assert day.timestamps is not None
    assert month.timestamps is not None
    assert np.diff(day.timestamps).tolist() == [31 * 86_400]  # of January
    assert np.diff(month.timestamps).tolist() == [86_400]
    # A date that does not fit what was said is a bad row, and no other date.
    _, report = built(["13/02/2020", "02/13/2020", "02/02/2020"], day_first=True)
    assert sum(report.dropped.values()) == 1


def test_an_order_that_no_row_shows_is_a_doubt_until_the_setting_says_it() -> None:
    texts = ["01/01/2020", "01/02/2020", "3/4/2020"]
    assert parse_times(texts).unclear == (1,)
    assert parse_times([*texts, "02/14/2020", "13/02/2020"]).unclear == (4, 3)
    february, january = 1_580_515_200, 1_577_923_200  # 2020-02-01 and 2020-01-02, 00:00 UTC
    for day_first, second in ((True, february), (False, january)):
        times = parse_times(texts, day_first)
        assert (times.values[1], times.unclear) == (second, ())
    assert parse_times(["13/02/2020"], day_first=False).values == [None]


@pytest.mark.parametrize(
    ("hours", "seconds"),
    [
        ("10:05", 36_300), ("10:05:03", 36_303), ("1:05", 3_900), ("1:05 PM", 47_100),
        ("12:05:03 am", 303), ("1:05PM", 47_100), ("10:05:03.5", 36_303.5),
        ("10:05:03+01:00", 32_703),
    ],
)  # fmt: skip
def test_hours_may_follow_such_a_date(hours: str, seconds: float) -> None:
    for blank in (" ", "T", ", "):
        parsed = parse_times([f"01/02/2020{blank}{hours}"], day_first=True)
        assert parsed.values == [1_580_515_200 + seconds]
