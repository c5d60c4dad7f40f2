"""README's tables are those of the committed results."""

from pathlib import Path

import pytest

from pfm_llm.base.errors import DataError
from pfm_llm.evaluation.results import ResultRow, write_results
from pfm_llm.suite.readme import with_fresh_tables

ROOT = Path(__file__).parents[3]


def test_tables_of_the_readme_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: ") >= 2
    assert with_fresh_tables(text, ROOT) == text, "README.md is stale; run make table"


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
    write_results(tmp_path / "r.json", [row], {"costs": costs, "environment": here})
    fresh = with_fresh_tables("<!-- table: r.json -->\n<!-- end of table -->", tmp_path)
    assert "0.5000" in fresh
    assert "4.0 MB a client and round each way (0.10 GB up, 0.10 GB down in all)" in fresh
    assert "24 client steps on the shared state and 12 on private ones" in fresh
    assert "50% of the users" in fresh
    assert "2 min of rounds, 1 min of evaluation" in fresh
