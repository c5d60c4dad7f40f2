"""The report of a load, as text for people."""

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
