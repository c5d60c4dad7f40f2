"""Claims are looked up, never typed; their bars are read as they are written."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.evaluation.personality.significance import over_seeds
from scripts.update_claims import (
    Claim,
    build_claims,
    claims_text,
    holds,
    is_stale,
    read_claims,
)

ROOT = Path(__file__).parents[3]


def row(metric: str, value: float, **fields: Any) -> dict[str, Any]:
    ends = {"ci_low": value - 0.25, "ci_high": value + 0.5}
    return {
        "metric": metric,
        "split": "test",
        "candidates": "full",
        "value": value,
        **ends,
    } | fields


def repository(root: Path, claim: dict[str, Any], *seeds: list[dict[str, Any]]) -> Path:
    """A repository with one claim ``a.b`` and a result file for each seed."""
    (root / "results").mkdir()
    for seed, rows in enumerate(seeds):
        content = {
            "rows": rows[:-1],
            "comparisons": rows[-1:],
            "config": {"evaluation": {"confidence": 0.95}},
            "costs": {"bytes": 6e6, "rounds": 4 * (seed + 1)},
            "environment": {"seed": seed, "git": {"commit": f"{seed}" * 40}},
        }
        (root / "results" / f"s{seed}.json").write_text(json.dumps(content))
    tree = {
        "sources": {"here": {"files": "results/s*.json", "command": "make it"}},
        "claims": {"a.b": {"from": "here", "unit": "U", "note": "n", **claim}},
    }
    (root / "results" / "claims.yaml").write_text(yaml.safe_dump(tree))
    return root


def only(root: Path) -> Claim:
    [claim] = build_claims(root)
    return claim


def test_the_committed_claims_are_those_of_the_committed_results() -> None:
    claims = build_claims(ROOT)
    assert len(claims) > 50
    assert not is_stale(ROOT, claims), "results/claims.json is stale; run make claims"


def test_claims_are_stale_when_anything_but_the_last_digits_differs(tmp_path: Path) -> None:
    claims = build_claims(ROOT)[:3]
    (tmp_path / "results").mkdir()

    def is_stale_after(**changes: Any) -> bool:
        changed = [dataclasses.replace(claims[0], **changes), *claims[1:]]
        (tmp_path / "results" / "claims.json").write_text(claims_text(changed))
        return is_stale(tmp_path, claims)

    value = claims[0].value
    assert not is_stale_after(value=value * (1 + 1e-12))
    assert is_stale_after(value=value * (1 + 1e-6))
    assert is_stale_after(ci_low=None)
    assert is_stale_after(note="another")
    assert is_stale(tmp_path, claims[:2])


def test_every_bar_of_the_committed_claims_holds() -> None:
    claims = read_claims(ROOT).values()
    assert [claim.id for claim in claims if claim.holds is False] == []
    assert sum(claim.holds is True for claim in claims) > 10


def test_a_figure_is_the_mean_over_seeds_with_an_interval_over_users_and_seeds(
    tmp_path: Path,
) -> None:
    seeds = [[row("other", 9.0), row("gain", 1.9)], [row("gain", 2.0), row("other", 9.0)]]
    claim = only(repository(tmp_path, {"row": {"metric": "gain"}, "bar": "ci_low > 1"}, *seeds))
    rows = [SimpleNamespace(**one) for one in (seeds[0][1], seeds[1][0])]
    whole = over_seeds(rows, 0.95)
    assert (claim.value, claim.ci_low, claim.ci_high) == (1.95, whole.low, whole.high)
    assert claim.ci_low < 1.95 - 0.25
    assert claim.holds is True
    assert claim.seeds == (0, 1)
    assert claim.commit == "000000000000, 111111111111"
    assert (claim.command, claim.file) == ("make it", "results/s*.json")


def test_the_least_row_of_all_seeds_can_be_claimed(tmp_path: Path) -> None:
    seeds = [[row("harm_1", 1.0), row("harm_2", -3.0)], [row("harm_1", -4.0), row("gain", -9.0)]]
    spec = {"row": {"metric": "harm_*"}, "least": "ci_high", "bar": "ci_high >= 0"}
    claim = only(repository(tmp_path, spec, *seeds))
    assert (claim.value, claim.ci_high, claim.holds) == (-4.0, -3.5, False)


def test_a_path_is_divided_and_scaled(tmp_path: Path) -> None:
    """6e6 bytes in 4 and in 8 rounds: 1.5 and 0.75 MB, 1.125 on average."""
    spec = {"path": ["costs", "bytes"], "per": ["costs", "rounds"], "scale": 1e-6}
    claim = only(repository(tmp_path, spec, [row("x", 1.0)], [row("x", 1.0)]))
    assert claim.value == pytest.approx(1.125)
    assert claim.ci_low is None
    assert claim.holds is None


def test_a_number_divides_too(tmp_path: Path) -> None:
    root = repository(tmp_path, {"path": ["costs", "rounds"], "per": 2}, [row("x", 1.0)])
    assert only(root).value == 2.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"row": {"metric": "none"}}, "claim a.b: 0 rows instead of one"),
        ({"row": {"split": "test"}}, "claim a.b: 2 rows instead of one"),
        ({"row": {"metrik": "gain"}}, "claim a.b: 'metrik'"),
        ({"path": ["costs", "euros"]}, "claim a.b: 'euros'"),
        ({}, "give either row or path"),
        ({"row": {"metric": "gain"}, "path": ["costs"]}, "give either row or path"),
        ({"row": {"metric": "gain"}, "value": 3}, r"unknown keys \['value'\]"),
        ({"row": {"metric": "gain"}, "from": "there"}, "source there is unknown"),
        ({"row": {"metric": "gain"}, "bar": "about 3"}, "bar 'about 3'"),
        ({"path": ["costs", "rounds"], "bar": "ci_low > 0"}, "figure with interval"),
    ],
)
def test_a_claim_that_cannot_be_looked_up_is_an_error(
    tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    root = repository(tmp_path, spec, [row("gain", 1.0), row("other", 2.0)])
    with pytest.raises(DataError, match=message):
        build_claims(root)


@pytest.mark.parametrize(
    ("bar", "expected"),
    [
        ("> 0.5", False), (">= 0.5", True), ("< 0.5", False), ("<= 0.5", True), ("< 0.6", True),
        ("value > 0", True), ("ci_low > 0", False), ("ci_low > -0.1", True), ("ci_high < 1", True),
    ],
)  # fmt: skip
def test_a_bar_is_asked_of_the_value_or_of_an_end(bar: str, expected: bool) -> None:
    claim = Claim("a.b", 0.5, 0.0, 0.9, "U", bar, None, "make it", "f", "c", (0,), "n")
    assert holds(bar, claim) is expected


def test_a_file_that_holds_no_claims_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run make claims"):
        read_claims(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.json").write_text('{"rows": [{"id": "a.b", "seeds": []}]}')
    with pytest.raises(CorruptFileError, match="holds no claims"):
        read_claims(tmp_path)


def test_claims_are_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.update_claims", "--check"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "not met: none" in done.stdout
