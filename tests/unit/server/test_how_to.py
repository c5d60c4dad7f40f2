"""The worked examples of the documentation do what it says."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.protocol import stages
from pfm_llm.protocol.stages import STAGES, Stages
from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.robust import AGGREGATORS
from pfm_llm.server.server import Server
from tests.unit.server.test_server import _server, _update

DOCS = Path(__file__).parents[3] / "docs"


def example(name: str) -> Any:
    """A class that a Python block of the documentation defines."""
    blocks = [
        block
        for page in sorted(DOCS.rglob("*.md"))
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        if f"class {name}" in block
    ]
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)  # noqa: S102 - of this repository
    return names[name]


def test_the_winsorised_mean_draws_the_extremes_in() -> None:
    drawn_in: Aggregator = example("WinsorisedMean")()
    for number, value in enumerate([-1e9, *range(1, 9), 1e9]):
        delta = {"lora.m.A": torch.tensor([float(value)])}
        drawn_in.add(ClientUpdate(str(number), 1, "hash", 1, 0.0, delta), 1.0)
    # Of ten values one at each end counts as its neighbour: the mean of 1, 1 … 8, 8.
    assert drawn_in.result()["lora.m.A"].item() == 4.5


def test_the_refusing_stage_costs_the_long_update_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STAGES", {**STAGES, "refuse": example("Refuse")})
    server: Server = _server()
    server._stages = Stages([("refuse", {"norm": 1.0})], seed=0, cohort_size=4)
    total = server.new_aggregator()
    assert server.receive(total, _update(server, "a", 0.1))
    assert not server.receive(total, _update(server, "b", 10.0))
    assert "client 'b': its update has norm 31.6, at most 1 is allowed" in total.tally.refusals[0]
    summary = server.aggregate(total)
    # Ten numbers of .1 have norm .1 times the square root of 10.
    assert summary.stages["refuse"] == {"largest_norm": pytest.approx(0.1 * 10**0.5)}


def test_an_aggregation_of_the_library_is_a_small_class() -> None:
    for kind in AGGREGATORS.values():
        assert len(inspect.getsource(kind).splitlines()) <= 60
