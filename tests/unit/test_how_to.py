"""The Python of docs/how-to.md runs, and what it makes does what the page says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfm_llm.config.schema import ColumnsConfig
from pfm_llm.data.rows import validate

PAGE = Path(__file__).parents[2] / "docs" / "how-to.md"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's blocks define, run one after another in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names: dict[str, Any] = {"__name__": "how_to"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102
    return names


def test_the_data_source_reads_a_log_and_counts_what_it_cannot_use(
    made: dict[str, Any], tmp_path: Path
) -> None:
    good = {"user_id": "u", "item_id": "i", "timestamp": 3, "title": "So What"}
    lines = [json.dumps(good), json.dumps({**good, "timestamp": "noon"}), json.dumps({})]
    (tmp_path / "plays.jsonl").write_text("\n".join(lines))
    raw = validate(made["read_plays"](tmp_path / "plays.jsonl"), ColumnsConfig(), 0.9)
    assert raw.catalogue.item_ids == ("i",)
    assert len(raw.users) == 1


def test_the_baseline_prefers_what_is_late_in_histories(made: dict[str, Any]) -> None:
    """Item 0 is met twice, an event before the end: 2 x 0.4 = 0.8 < 1 + 0 of item 1."""
    histories = [np.array([0, 1]), np.array([0, 2])]
    scores = made["Trending"](0.4).fit(histories, 4).score(histories[:1])
    assert scores.tolist() == [[pytest.approx(0.8), 1.0, 1.0, 0.0]]


def test_the_metric_is_its_formula(made: dict[str, Any]) -> None:
    """0.2 at rank 1, 0.2 x 0.8 at rank 2, nothing below the list."""
    ranks = np.array([1, 2, 3])
    assert made["rbp"](ranks, 2).tolist() == [pytest.approx(0.2), pytest.approx(0.16), 0.0]
    assert made["rbp"](ranks[:0], 2).size == 0
