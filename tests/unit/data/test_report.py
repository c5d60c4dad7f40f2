"""The report of a load: text for people, JSON for the cache."""

import json

import pytest

from pfm_llm.data.report import LoadReport

REPORT = LoadReport(
    num_rows=1200,
    num_interactions=1100,
    num_users=30,
    num_items=40,
    dropped={"torn": 60, "late": 40},
    examples=("f.csv line 7: torn",),
    notes=("a word",),
)


def test_describe_tells_counts_reasons_examples_and_notes() -> None:
    assert REPORT.describe().splitlines() == [
        "1,200 rows read, 1,100 interactions kept: 30 users, 40 items",
        "  60 dropped: torn",
        "  40 dropped: late",
        "  bad row, for example: f.csv line 7: torn",
        "  note: a word",
    ]


def test_json_reads_back_to_an_equal_report() -> None:
    assert LoadReport.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


@pytest.mark.parametrize("tree", [{}, {**REPORT.to_json(), "other": 1}])
def test_json_of_something_else_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        LoadReport.from_json(tree)
