"""The benchmark of masks, on a tiny run: what it writes down is what happened."""

import argparse
import statistics
from pathlib import Path

import pytest

from benchmarks import masks
from pfm_llm.base import files
from tests.support.tiny import Tiny

COHORT, ROUNDS = 9, 2


def test_the_race_is_written_down_and_told(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks.json"
    masks.run(
        argparse.Namespace(
            config=str(tiny.config_file(tmp_path / "tiny.yaml", tmp_path)),
            cohort=COHORT,
            dropouts=1 / 3,
            norm=4.0,
            rounds=ROUNDS,
            threads=1,
            out=out,
        )
    )
    result = files.read_json(out)
    rows = {row["way"]: row for row in result["rows"]}
    assert {way: row["clients_summed"] for way, row in rows.items()} == {
        "clear": [9, 9],
        "masked": [9, 9],
        "masked_all_pairs": [9, 9],
        "clear_dropouts": [6, 6],
        "masked_dropouts": [6, 6],
    }
    for way, clear in masks.BESIDE.items():
        pairs = zip(rows[way]["cpu_seconds"], rows[clear]["cpu_seconds"], strict=True)
        expected = statistics.median(own / other - 1 for own, other in pairs)
        assert result["overhead"][way]["median"] == pytest.approx(expected)
        whole, rest = (sum(rows[name]["cpu_seconds"]) for name in (way, clear))
        assert result["overhead"][way]["together"] == pytest.approx(whole / rest - 1)
        assert 0 < result["overhead"][way]["share_of_masks"] < 1
        # float32 rounds both means.
        assert 0 < result["error"][way]["largest"] <= result["bound"]["error"] + 4 * 2**-24
        assert result["error"][way]["rms"] < 1e-4 * result["error"][way]["rms_of_mean"]
    assert [row["neighbours"] for row in result["rows"]] == [None, 8, 8, None, 8]
    assert result["dropouts"] == {
        "clients": 9,
        "vanished": 3,
        "rounds": 2,
        "rounds_lost": 0,
        "survived": 1 / 3,
    }
    alone = result["by_itself"]
    assert alone["bytes"]["update_masked"] == alone["bytes"]["update_in_the_clear"] + 8
    assert min(alone["cpu_seconds"].values()) > 0
    assert result["environment"]["seed"] == 0
    told = capsys.readouterr().out
    assert "3 of 9 clients vanished: 0 of 2 rounds were lost" in told
    assert all(way in told for way in rows)
