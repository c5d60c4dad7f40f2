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
    """The benchmark from its command line, with two norms for each of two ε."""
    config = tiny.config_file(folder / "tiny.yaml", folder / "runs", head__item_met=False)
    out = folder / "results" / "curve.json"
    given = ["--config", str(config), "--out", str(out), "--tables", "rows", "--epsilons", "inf"]
    given += ["8", "--cohorts", "8", "--rounds", "3", "--norms", "0.1", "1", "--scales", "1"]
    count_in_place_of_epsilon(monkeypatch)
    monkeypatch.setattr(
        sys, "argv", ["privacy_curve.py", *given, "--participation", "passes", *more]
    )
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
    assert [(row["epsilon"], row["norm"]) for row in result["rows"]] == [
        ("inf", 0.1),
        ("inf", 1.0),
        (8.0, 0.1),
        (8.0, 1.0),
    ]
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
