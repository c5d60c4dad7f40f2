"""README's tables are those of the committed results."""

from pathlib import Path

import pytest

from pfm_llm.errors import DataError
from pfm_llm.readme import with_fresh_tables

ROOT = Path(__file__).parents[2]


def test_tables_of_the_readme_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table: ") >= 2
    assert with_fresh_tables(text, ROOT) == text, "README.md is stale; run make table"


def test_a_stale_table_is_replaced_and_the_text_around_it_stays(tmp_path: Path) -> None:
    (tmp_path / "race.json").write_text(
        '{"rows": [{"case": "stacked_cached", "median": 8.0, "min": 7.5},'
        ' {"case": "slow", "median": 2.0, "min": 1.9}],'
        ' "ratios": {"stacked_cached/slow": {"min": 3.9, "median": 4.0}}}'
    )
    text = "before\n<!-- table: race.json -->\nold\n<!-- end of table -->\nafter\n"
    fresh = with_fresh_tables(text, tmp_path)
    assert "old" not in fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("<!-- end of table -->\nafter\n")
    assert "| `slow` | 2.00 | 1.90 | 4.0× |" in fresh
    assert with_fresh_tables(fresh, tmp_path) == fresh


def test_a_missing_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json"):
        with_fresh_tables("<!-- table: nothing.json -->\n<!-- end of table -->", tmp_path)
