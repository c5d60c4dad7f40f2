"""A server that takes the sum of a node, and what it refuses of one."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from pfm_llm.protocol.types import NodeUpdate
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.robust import CoordinateMedian
from pfm_llm.server.server import Server
from tests.unit.server.test_server import _server, _update


def a_sum(server: Server, value: float, num_clients: int = 3, **more: Any) -> NodeUpdate:
    """The sum of clients whose changes have the mean ``value``."""
    tensors = server.shared.tensors.items()
    found = NodeUpdate(
        node_id="n01",
        round_number=1,
        contract_hash=server.contract.hash(),
        num_clients=num_clients,
        num_examples=6,
        loss=2.0,
        delta={name: torch.full_like(t, value * num_clients) for name, t in tensors},
    )
    return dataclasses.replace(found, **more)


def test_a_sum_counts_as_its_clients() -> None:
    """Three clients of mean 2 and one of 6: (3 * 2 + 6) / 4 = 3."""
    server, total = _server(), WeightedMean()
    assert server.receive_sum(total, a_sum(server, 2.0), ["a", "b", "c"])
    assert server.receive(total, _update(server, "d", 6.0))
    summary = server.aggregate(total)
    assert server.shared.tensors["head.item_bias"].tolist() == [3.0] * 4
    assert (summary.num_updates, summary.num_examples, summary.refusals) == (4, 7, ())
    assert summary.loss == pytest.approx((3 * 2.0 + 6.0) / 4)


def test_who_is_not_in_the_sum_gave_no_answer() -> None:
    server, total = _server(), WeightedMean()
    assert server.receive_sum(total, a_sum(server, 2.0, 2), ["a", "b", "c"])
    assert (total.tally.num_updates, dict(total.tally.reasons)) == (2, {"no_answer": 1})
    server.aggregate(total)
    assert server.shared.tensors["head.item_bias"].tolist() == [2.0] * 4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"contract_hash": "0"}, "contract"),
    ({"round_number": 2}, "round"),
    ({"num_clients": 4}, "malformed"),
    ({"num_clients": 0}, "malformed"),
    ({"num_clients": True}, "malformed"),
    ({"num_examples": -1}, "malformed"),
    ({"loss": math.nan}, "not_finite"),
    ({"delta": {}}, "contract"),
    ({"delta": None}, "malformed"),
    ({"node_id": 3}, "malformed"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG)
def test_a_wrong_sum_is_refused_for_all_its_clients(change: dict[str, Any], reason: str) -> None:
    server, total = _server(), WeightedMean()
    before = server.state_tensors()
    assert not server.receive_sum(total, a_sum(server, 2.0, **change), ["a", "b", "c"])
    assert dict(total.tally.reasons) == {reason: 3}
    server.aggregate(total)
    assert all(torch.equal(server.state_tensors()[name], t) for name, t in before.items())


def test_a_client_counts_once_and_only_in_its_cohort() -> None:
    server, total = _server(), WeightedMean()
    assert server.receive(total, _update(server, "a", 1.0))
    assert not server.receive_sum(total, a_sum(server, 2.0), ["a", "b", "c"])
    assert dict(total.tally.reasons) == {"twice": 3}
    assert not server.receive_sum(WeightedMean(), a_sum(server, 2.0), ["x", "b", "c"])


def test_a_sum_is_no_part_of_a_median() -> None:
    server, total = _server(aggregator="median"), CoordinateMedian()
    assert not server.receive_sum(total, a_sum(server, 2.0), ["a", "b", "c"])


def test_a_far_too_large_mean_is_refused() -> None:
    server, total = _server(), WeightedMean()
    assert not server.receive_sum(total, a_sum(server, 1e9), ["a", "b", "c"])
    assert dict(total.tally.reasons) == {"too_large": 3}


@pytest.mark.parametrize("by_sum", [True, False])
def test_the_order_in_which_tensors_arrive_has_no_effect(by_sum: bool) -> None:
    """A reader of safetensors gives names in any order, and sizes are told apart by their place."""
    states = []
    for step in (1, -1):
        server, total = _server(), WeightedMean()
        one, whole = _update(server, "a", 2.0), a_sum(server, 2.0)
        one.delta["head.item_bias"].mul_(5)  # type: ignore[index]
        whole.delta["head.item_bias"].mul_(5)
        found = whole if by_sum else one
        found = dataclasses.replace(found, delta=dict(list(found.delta.items())[::step]))
        if isinstance(found, NodeUpdate):
            assert server.receive_sum(total, found, ["a", "b", "c"])
        else:
            assert server.receive(total, found)
        server.aggregate(total)
        states.append(server.state_tensors())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
