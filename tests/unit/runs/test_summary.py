"""What a run found, in sentences."""

import dataclasses
from typing import Any

import pytest

from pfm_llm.runs import summary
from tests.support.suite_double import row


def results(weight: float | None = 1.0, **rows: list[Any]) -> dict[str, Any]:
    """Of ``results.json`` what a summary reads."""
    tree: dict[str, Any] = {"config": {"evaluation": {"confidence": 0.9}}}
    if weight is not None:
        tree["private_weight"] = weight
    return tree | {key: [dataclasses.asdict(one) for one in found] for key, found in rows.items()}


def difference(metric: str, value: float, half: float, **changes: Any) -> Any:
    low, high = value - half, value + half
    return row(metric=metric, split="test", value=value, ci_low=low, ci_high=high, **changes)


@pytest.mark.parametrize(
    ("value", "gain", "against"),
    [
        (0.2, "users are served better with it", "does better than ease"),
        (-0.2, "users are served worse with it", "does worse than ease"),
        (0.05, "does not show whether it helps", "does not differ clearly from ease"),
    ],
)
def test_the_interval_decides_what_is_said(value: float, gain: str, against: str) -> None:
    gains, comparisons = (
        [difference(metric, value, 0.1)] for metric in ("gain_ndcg", "ndcg_over_ease")
    )
    first, second, last = summary.findings(results(gains=gains, comparisons=comparisons))
    shown = f"{value:+.4f} [{value - 0.1:+.4f}, {value + 0.1:+.4f}] NDCG@10"
    assert first.startswith(f"On test, the private part adds {shown}: ")
    assert first.endswith(f"{gain}.")
    assert second == f"On test, the shared part with the private one {against}: {shown}."
    assert "90 % intervals" in last


def test_a_difference_that_would_be_settled_alone_is_not_among_many() -> None:
    """Each of five is 2 standard errors from 0: p is .046, and .23 after Holm's correction."""
    rows = [difference(f"ndcg_over_{name}", 0.2, 0.1644854) for name in "abcde"]
    alone, _ = summary.findings(results(None, comparisons=rows[:1]))
    assert "does better than a" in alone
    *lines, last = summary.findings(results(None, comparisons=rows))
    assert len(lines) == 5
    assert all("does not differ clearly from" in line for line in lines)
    assert all(line.endswith("(the interval alone says otherwise).") for line in lines)
    assert last.endswith("hold after Holm's correction for 5 tests.")


def test_the_cut_off_is_that_of_the_figures() -> None:
    gain = difference("gain_ndcg", 0.2, 0.1, k=5)
    first, _ = summary.findings(results(gains=[gain]))
    assert " NDCG@5: " in first
    assert "NDCG is NDCG@5\n" in summary.differences_table([gain], 0.95)


def test_a_gain_in_log_rank_says_where_an_item_stands() -> None:
    """exp(-0.1) is 0.905."""
    (line, _) = summary.findings(results(gains=[difference("gain_log_rank", 0.1, 0.05)]))
    assert "(a held-out item stands at 90 % of its former rank)" in line


def test_a_private_part_that_is_left_out_adds_nothing() -> None:
    gains = [difference("gain_ndcg", 0.0, 0.0), difference("gain_log_rank", 0.0, 0.0)]
    first, _ = summary.findings(results(0.0, gains=gains))
    assert first == "The private part adds nothing: it is left out, at a weight of 0."


def test_without_a_private_part_the_shared_one_is_compared() -> None:
    rows = [difference("ndcg_over_ease", 0.2, 0.1, mode="shared_only")]
    first, _ = summary.findings(results(None, gains=[], comparisons=rows))
    assert first.startswith("On test, the shared part does better than ease: +0.2000")


def test_results_without_differences_have_nothing_to_say() -> None:
    assert summary.findings(results(None)) == []
    assert summary.differences_table([], 0.95) == ""


def test_the_table_has_a_line_for_each_difference() -> None:
    rows = [difference("gain_ndcg", 0.2, 0.1), difference("ndcg_over_ease", -0.2, 0.1)]
    table = summary.differences_table(rows, 0.95)
    assert "| Split | Difference | Value [95 %] | Users |" in table
    assert "| test | gain_ndcg | +0.2000 [+0.1000, +0.3000] | 20 |" in table
    assert "| test | ndcg_over_ease | -0.2000 [-0.3000, -0.1000] | 20 |" in table


def test_refused_updates_are_told_with_their_reasons() -> None:
    records = [
        {"round": 1, "refused": 3, "refused_by_reason": {"too_large": 2, "malformed": 1}},
        {"round": 2, "refused": 0},
        {"round": 3, "refused": 1, "refused_by_reason": {"too_large": 1}},
    ]
    counts = summary.refused_by_reason(records)
    assert counts == {"too_large": 3, "malformed": 1}
    costs = {"client_rounds": 24, "refused_updates": 4, "refused_by_reason": counts}
    [line] = summary.findings({**results(None), "costs": costs})
    assert line == (
        "Of 24 updates of clients, 4 were refused (malformed 1, too_large 3) and had no effect."
    )
