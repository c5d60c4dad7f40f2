"""The benchmark of privacy, on a tiny run: validation chooses, and test is measured once."""

import math
import sys
from pathlib import Path

import pytest

from benchmarks import privacy_curve
from pfm_llm.base import files
from tests.support.privacy import count_in_place_of_epsilon
from tests.support.tiny import Tiny


def run(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """The benchmark from its command line, with two plans for each of two ε."""
    config = tiny.config_file(
        folder / "tiny.yaml",
        folder / "runs",
        head__item_met=False,
        adapters__private__kind="taste",
    )
    out = folder / "results" / "curve.json"
    given = ["--config", str(config), "--out", str(out), "--tables", "rows", "--epsilons", "inf"]
    given += ["8", "--plans", "8x3@1", "24x2@0.5", "--set", "head.dim=8"]
    count_in_place_of_epsilon(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["privacy_curve.py", *more, *given])
    privacy_curve.main()
    return out


def test_the_curve_is_written_down_and_told(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = run(tiny, tmp_path, monkeypatch)
    result = files.read_json(out)
    assert [
        (row["epsilon"], row["plan"]["rounds"], row["participation"]) for row in result["rows"]
    ] == [("inf", 3, "passes"), ("inf", 2, "passes"), (8.0, 3, "poisson"), (8.0, 2, "passes")]
    assert result["arguments"]["plans"] == ["8x3@1", "24x2@0.5"]
    for epsilon in ("inf", 8.0):
        own = [row for row in result["rows"] if row["epsilon"] == epsilon]
        best = max(row["validation"]["shared_private"]["ndcg@10"] for row in own)
        [chosen] = [row for row in own if row["chosen"]]
        assert chosen["validation"]["shared_private"]["ndcg@10"] == best
        assert [row["test"] is not None for row in own] == [row["chosen"] for row in own]
    assert [row["spent"] is None for row in result["rows"]] == [True, True, False, False]
    without, private = result["kept"]
    assert (without["ndcg_kept"], without["log_rank_kept"]) == (1.0, 1.0)
    found = {row["epsilon"]: row["test"]["shared_private"] for row in result["rows"] if row["test"]}
    expected = found[8.0]["ndcg@10"] / found["inf"]["ndcg@10"]
    assert private["ndcg_kept"] == pytest.approx(expected)
    assert math.isfinite(result["popularity"]["test"]["log_rank"])
    assert result["environment"]["versions"]["torch"]
    assert "output" not in result["config"]["rows"]
    assert (out.parent / "test_openings.json").exists()
    assert "popularity on test" in capsys.readouterr().out


def test_without_test_it_is_left_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tiny, tmp_path, monkeypatch, "--no-test")
    result = files.read_json(out)
    assert all(row["test"] is None for row in result["rows"])
    assert result["popularity"].keys() == {"validation"}
    assert {one["split"] for one in result["kept"]} == {"validation"}
    assert not (out.parent / "test_openings.json").exists()
