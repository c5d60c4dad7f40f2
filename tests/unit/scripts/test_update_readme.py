"""The tables of README and docs are those of the committed results."""

import re
from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.results import ResultRow, write_results
from scripts.update_claims import Claim, claims_text
from scripts.update_readme import with_fresh_tables

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_tables_of_a_page_are_those_of_the_committed_results(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "<!-- end of table -->" in text
    assert with_fresh_tables(text, ROOT) == text, f"{name} is stale; run make table"


def test_the_front_page_has_one_table_of_at_most_eight_rows() -> None:
    text = (ROOT / "README.md").read_text()
    [table] = re.findall(r"<!-- claims: .*?<!-- end of table -->", text, re.DOTALL)
    assert text.count("<!-- end of table -->") == 1
    assert len(re.findall(r"^\|", table, re.MULTILINE)) <= 2 + 8


def test_a_stale_table_is_replaced_and_the_text_around_it_stays(tmp_path: Path) -> None:
    (tmp_path / "race.json").write_text(
        '{"rows": [{"case": "stacked_cached", "median": 8.0, "min": 7.5},'
        ' {"case": "slow", "median": 2.0, "min": 1.9}],'
        ' "ratios": {"stacked_cached/slow": {"min": 3.9, "median": 4.0}},'
        ' "config": {"adapters": {"num_layers": 2}, "blocks": 30, "clients": 16,'
        ' "items_per_window": 32, "tokens_per_window": {"median": 171.5}},'
        ' "environment": {"threads": 2, "cpu": "a CPU", "dtype": "bfloat16"},'
        ' "trunk_cache_fill_s_per_client": 0.123}'
    )
    text = "before\n<!-- table: race.json -->\nold\n<!-- end of table -->\nafter\n"
    fresh = with_fresh_tables(text, tmp_path)
    assert "old" not in fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("<!-- end of table -->\nafter\n")
    assert "| `slow` | 2.00 | 1.90 | 4.0× |" in fresh
    assert "2 of 30 layers adapted, 16 clients" in fresh
    assert "(171.5 tokens at the median)" in fresh
    assert "took 0.12 s a window" in fresh
    assert with_fresh_tables(fresh, tmp_path) == fresh


def test_a_missing_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json"):
        with_fresh_tables("<!-- table: nothing.json -->\n<!-- end of table -->", tmp_path)


def claims_file(root: Path, *names: str) -> None:
    """Claims ``one.<name>`` and ``two.<name>`` for each name, with values 0.1 and 0.2."""
    (root / "results").mkdir()
    rows = [
        Claim(f"{prefix}.{name}", value, 0.05, 0.3, unit, None, None, "c", "f", "c", (0,), note)
        for name in names
        for prefix, value, unit, note in (
            ("one", 0.1, "NDCG", f"The {name}"),
            ("two", 0.2, "HR", ""),
        )
    ]
    (root / "results" / "claims.json").write_text(claims_text(rows))


def test_a_table_of_claims_has_a_row_for_each_name_and_a_column_for_each_prefix(
    tmp_path: Path,
) -> None:
    claims_file(tmp_path, "first", "last")
    text = "<!-- claims: one two: last first -->\n<!-- end of table -->"
    assert with_fresh_tables(text, tmp_path).splitlines()[1:-1] == [
        "| What ranks | NDCG [95 %] | HR |",
        "| --- | ---: | ---: |",
        "| The last | 0.1000 [0.0500, 0.3000] | 0.2000 |",
        "| The first | 0.1000 [0.0500, 0.3000] | 0.2000 |",
    ]


def test_a_table_of_claims_that_are_not_there_is_an_error(tmp_path: Path) -> None:
    claims_file(tmp_path, "first")
    with pytest.raises(DataError, match=r"no claim two\.next"):
        with_fresh_tables("<!-- claims: two: next -->\n<!-- end of table -->", tmp_path)


def test_costs_stand_below_a_table_of_results(tmp_path: Path) -> None:
    """A million shared numbers of four bytes are 4 MB; 120 s are 2 min and 61 s are 1."""
    costs = {
        "rounds": 3,
        "shared_client_steps": 24,
        "private_client_steps": 12,
        "shared_numbers": 1_000_000,
        "bytes_up": 96_000_000,
        "bytes_down": 96_000_000,
        "personalise_client_steps": 40,
        "share_of_users_with_private_adapter": 0.5,
        "round_seconds": 120.0,
        "evaluation_seconds": 61.0,
    }
    row = ResultRow(
        method="pfm", mode="shared_only", task="next_item", protocol="leave_last_out",
        budget="3 rounds", split="test", candidates="full", metric="ndcg", k=10,
        value=0.5, ci_low=0.4, ci_high=0.6, num_users=2, seed=0,
    )  # fmt: skip
    here = {"threads": 2, "cpu": "a CPU", "dtype": "bfloat16"}
    config = {"evaluation": {"confidence": 0.9}}
    extra = {"config": config, "costs": costs, "environment": here}
    write_results(tmp_path / "r.json", [row], extra)
    fresh = with_fresh_tables("<!-- table: r.json -->\n<!-- end of table -->", tmp_path)
    assert "0.5000" in fresh
    assert "NDCG@10 [90 %]" in fresh
    assert "4.0 MB a client and round each way (0.10 GB up, 0.10 GB down in all)" in fresh
    assert "24 client steps on the shared state and 12 on private ones" in fresh
    assert "50% of the users" in fresh
    assert "2 min of rounds, 1 min of evaluation" in fresh
