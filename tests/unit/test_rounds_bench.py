"""The benchmark of rounds, on a tiny run: each method trains, and the ratios are those of a lap."""

import argparse
import statistics
from pathlib import Path

import pytest

from benchmarks import rounds
from pfm_llm.base import files
from tests.support.tiny import Tiny


def test_methods_are_raced_in_turn(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "rounds.json"
    tiny.config_file(path, tmp_path, method="pfm")
    rounds.run(argparse.Namespace(config=str(path), laps=3, rounds=2, threads=1, out=out))
    result = files.read_json(out)
    rates = {row["case"]: row["values"] for row in result["rows"]}
    assert list(rates) == ["pfm", "pfm_embedding", "no_pass"]
    assert {row["unit"] for row in result["rows"]} == {"rounds_per_s"}
    for other in ("pfm_embedding", "no_pass"):
        pairs = zip(rates["pfm"], rates[other], strict=True)
        expected = statistics.median(own / theirs for own, theirs in pairs)
        assert result["ratios"][f"pfm/{other}"]["median"] == pytest.approx(expected)
    assert "pfm/pfm_embedding" in capsys.readouterr().out
