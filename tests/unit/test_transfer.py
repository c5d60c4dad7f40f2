"""The benchmark of transfer measures a test split once, and says how often that was done."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.transfer import _Seed
from benchmarks.transferring import serving
from benchmarks.transferring.worlds import World
from pfm_llm.data.report import LoadReport
from pfm_llm.data.splits import split_interactions
from pfm_llm.runs.run import Corpus
from tests.unit.data.split_cases import FRACTION, LAST_OUT, make

DATA = make([[1, 2, 3, 4, 5, 6, 7], [3, 2, 1, 7, 6, 5]])
WAYS = (serving.PERSONAL, serving.SHARED)


@pytest.fixture
def seed(tmp_path: Path) -> _Seed:
    world = World({}, tmp_path / "items.csv")
    report: LoadReport = None  # type: ignore[assignment]
    data = Corpus(DATA, report, split_interactions(DATA, LAST_OUT))
    return _Seed(0, tmp_path, world, world, data, 1.0, (), tmp_path / "test_openings.json")


def split_by(seed: _Seed, rule: Any) -> _Seed:
    data = dataclasses.replace(seed.data, split=split_interactions(DATA, rule))
    return dataclasses.replace(seed, data=data, methods={})


def test_ranks_are_kept_for_an_adapter_and_a_split(
    seed: _Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def served(folder: Path, items: Path, data: Corpus, what: str, ways: Any) -> Any:
        calls.append((folder.name, len(data.split.test.targets[0])))
        return {way: [len(calls)] for way in ways}

    monkeypatch.setattr(serving, "served", served)
    rows = Path("published") / "rows-source-s0-1a2b3c4d"
    assert seed._served(rows, "rows_zero_shot", WAYS) == {way: [1] for way in WAYS}
    assert seed._served(rows, "rows_zero_shot", WAYS) == {way: [1] for way in WAYS}
    half = split_by(seed, FRACTION.model_copy(update={"held_out": 0.6}))
    assert half._served(rows, "rows_zero_shot", WAYS) == {way: [2] for way in WAYS}
    assert calls == [(rows.name, 1), (rows.name, 2)]
    # What is read again is not counted again, and the splits are counted apart.
    once = {"times": 1, "times_with_these_settings": 1}
    for one in (seed, half):
        assert one.counts["methods"] == {"rows_zero_shot": once}
    assert seed.counts["split"] != half.counts["split"]
    again = seed._served(rows.with_name("rows-source-s1-1a2b3c4d"), "rows_zero_shot", WAYS)
    assert again == {way: [3] for way in WAYS}
    assert seed.counts["methods"]["rows_zero_shot"] == {**once, "times": 2}
