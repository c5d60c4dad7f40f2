"""The server: refuses and goes on, steps or stays, and can be restored to the bit."""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import CheckpointError, ConfigError, ContractError, TrainingError
from pfm_llm.config.choices import ServerOptimizer, Weighting
from pfm_llm.config.schema import FederationConfig, ServerConfig
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.server.aggregation import RunningSum
from pfm_llm.server.server import Server
from tests.support.tables import table_of

_CLIENTS = ("a", "b", "c", "d")


def _table(width: int = 3) -> ParameterTable:
    return table_of({"lora.m.A": torch.zeros(2, width), "head.item_bias": torch.zeros(4)})


def _contract(table: ParameterTable) -> UpdateContract:
    return table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")


def _server(cohort_size: int = 4, width: int = 3, **settings: Any) -> Server:
    settings.setdefault("optimizer", ServerOptimizer.AVERAGE)
    settings.setdefault("lr_schedule", "constant")
    config = FederationConfig(cohort_size=cohort_size, server=ServerConfig(**settings))
    table = _table(width)
    return Server(table, _contract(table), _CLIENTS, config, seed=0)


def _update(
    server: Server, client_id: str, value: float, round_number: int = 1, num_examples: int = 1
) -> ClientUpdate:
    delta = {n: torch.full_like(t, value) for n, t in server.shared.tensors.items()}
    return server.contract.build(client_id, round_number, num_examples, abs(value), delta)


def _snapshot(server: Server) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in server.state_tensors().items()}


def test_a_round_of_averaging() -> None:
    server, total = _server(), RunningSum()
    for client_id, value in zip(_CLIENTS, (1.0, 2.0, 3.0, 6.0), strict=True):
        assert server.receive(total, _update(server, client_id, value))
    summary = server.aggregate(total)
    assert torch.equal(server.shared.tensors["lora.m.A"], torch.full((2, 3), 3.0))
    assert summary.loss == 3.0
    assert (summary.num_updates, summary.num_examples, summary.refusals) == (4, 4, ())
    # 2 * 3 + 4 = 10 values of 3: norm sqrt(10 * 9)
    assert summary.update_norm == pytest.approx(math.sqrt(90))
    assert summary.lr_factor == 1.0


@pytest.mark.parametrize(
    ("weighting", "expected"), [(Weighting.UNIFORM, 5.0), (Weighting.NUM_EXAMPLES, 2.5)]
)
def test_weighting(weighting: Weighting, expected: float) -> None:
    # uniform: (0 + 10) / 2; by examples: (3 * 0 + 1 * 10) / 4
    server, total = _server(weighting=weighting), RunningSum()
    server.receive(total, _update(server, "a", 0.0, num_examples=3))
    server.receive(total, _update(server, "b", 10.0, num_examples=1))
    server.aggregate(total)
    assert server.shared.tensors["head.item_bias"].tolist() == [expected] * 4


def _without(update: ClientUpdate, name: str) -> ClientUpdate:
    delta = {n: tensor for n, tensor in update.delta.items() if n != name}
    return dataclasses.replace(update, delta=delta)


def test_bad_updates_are_refused_and_counted_and_the_round_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, total = _server(), RunningSum()
    bad = [
        _update(server, "b", math.nan),
        _update(server, "c", 1.0, round_number=2),
        _without(_update(server, "d", 1.0), "head.item_bias"),
        dataclasses.replace(_update(server, "d", 1.0), contract_hash="0"),
        _update(server, "stranger", 1.0),
    ]
    with caplog.at_level(logging.WARNING, logger="pfm_llm.server.server"):
        assert server.receive(total, _update(server, "a", 2.0))
        assert not any(server.receive(total, update) for update in bad)
        assert not server.receive(total, _update(server, "a", 9.0))  # a second time
    summary = server.aggregate(total)
    assert server.shared.tensors["head.item_bias"].tolist() == [2.0] * 4
    assert summary.num_updates == 1
    reasons = ("loss is nan", "round 2", "lacks", "contract", "not in the cohort", "twice")
    assert len(summary.refusals) == len(caplog.records) == len(reasons)
    assert all(r in text for r, text in zip(reasons, summary.refusals, strict=True))


def test_a_client_outside_the_cohort_is_refused() -> None:
    server, total = _server(cohort_size=2), RunningSum()
    server.load_state_tensors(server.state_tensors(), 2)
    cohort = server.select_cohort(3)
    outside = next(client for client in _CLIENTS if client not in cohort)
    assert server.receive(total, _update(server, cohort[0], 1.0, 3))
    assert not server.receive(total, _update(server, outside, 1.0, 3))


def test_nothing_accepted_leaves_the_state_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    server, total = _server(optimizer=ServerOptimizer.FEDADAM), RunningSum()
    server.receive(total, _update(server, "a", math.nan))
    before = _snapshot(server)
    with caplog.at_level(logging.WARNING, logger="pfm_llm.server.server"):
        summary = server.aggregate(total)
    assert "none of 1 updates was accepted" in caplog.text
    assert (summary.num_updates, summary.loss, summary.update_norm) == (0, None, 0.0)
    assert len(summary.refusals) == 1
    after = server.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_that_is_not_finite_leaves_the_state() -> None:
    server, total = _server(optimizer=ServerOptimizer.FEDADAM), RunningSum()
    server.receive(total, _update(server, "a", 1.0))
    server.aggregate(total)
    before = _snapshot(server)
    huge = RunningSum()
    server.receive(huge, _update(server, "b", 1e30, 2))
    with pytest.raises(TrainingError, match="not finite"):
        server.aggregate(huge)
    after = server.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _play(server: Server, rounds: range) -> None:
    for round_number in rounds:
        total = RunningSum()
        for index, client_id in enumerate(server.select_cohort(round_number)):
            value = math.sin(10 * round_number + index)
            server.receive(total, _update(server, client_id, value, round_number))
        server.aggregate(total)


@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
def test_restored_server_goes_on_to_the_bit(optimizer: ServerOptimizer) -> None:
    whole = _server(cohort_size=3, optimizer=optimizer)
    _play(whole, range(1, 7))
    first = _server(cohort_size=3, optimizer=optimizer)
    _play(first, range(1, 4))
    saved = first.state_tensors()
    second = _server(cohort_size=3, optimizer=optimizer)
    second.load_state_tensors(saved, 3)
    assert second.shared.round_number == first.shared.round_number == 3
    _play(second, range(4, 7))
    expected, found = whole.state_tensors(), second.state_tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 5}, r"float32\[2, 3\], must be float32\[2, 5\]"),
        ({"optimizer": ServerOptimizer.FEDAVGM}, "absent, must be"),
    ],
)
def test_state_of_another_model_is_refused(other: dict[str, Any], message: str) -> None:
    server = _server(**other)
    before = _snapshot(server)
    with pytest.raises(CheckpointError, match=message):
        server.load_state_tensors(_server().state_tensors(), 1)
    after = server.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cohorts_are_a_function_of_the_round() -> None:
    server = _server(cohort_size=2)
    once = [server.select_cohort(r) for r in (1, 2, 3, 4)]
    assert [_server(cohort_size=2).select_cohort(r) for r in (4, 3, 2, 1)] == once[::-1]
    with pytest.raises(ConfigError, match="cohort_size is 9"):
        _server(cohort_size=9).select_cohort(1)


def test_contract_and_shared_state_of_another_table_are_refused() -> None:
    table, other = _table(3), _table(5)
    with pytest.raises(ContractError, match=r"contract .*lora\.m\.A is float32\[2, 5\]"):
        Server(table, _contract(other), _CLIENTS, FederationConfig(), 0)
    start = other.initial_state()
    with pytest.raises(ContractError, match=r"shared state .*lora\.m\.A is float32\[2, 5\]"):
        Server(table, _contract(table), _CLIENTS, FederationConfig(), 0, start)


def test_a_server_starts_from_the_shared_state_that_it_is_given() -> None:
    table = _table()
    start = SharedState({name: value + 2 for name, value in table.initial_state().tensors.items()})
    server = Server(table, _contract(table), _CLIENTS, FederationConfig(), 0, start)
    assert server.shared is start


def test_what_is_not_sent_stays_as_it_was() -> None:
    frozen = dataclasses.replace(_table()["lora.m.A"], sent=False)
    table = ParameterTable({**_table(), frozen.name: frozen}.values())
    config = FederationConfig(cohort_size=4)
    server, total = Server(table, _contract(table), _CLIENTS, config, 0), RunningSum()
    delta = {"head.item_bias": torch.ones(4)}
    assert server.receive(total, server.contract.build("a", 1, 1, 1.0, delta))
    server.aggregate(total)
    assert not server.shared.tensors["lora.m.A"].any()
    assert server.shared.tensors["head.item_bias"].all()
