"""The server: refuses and goes on, steps or stays, and can be restored to the bit."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import CheckpointError, ConfigError, ContractError, TrainingError
from pfm_llm.config.choices import Aggregation, ServerOptimizer, Weighting
from pfm_llm.config.schema import FederationConfig, ServerConfig
from pfm_llm.config.stages import ClipConfig, StageConfig
from pfm_llm.protocol.contract import UpdateContract
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.server import Server
from tests.support.tables import table_of

_CLIENTS = ("a", "b", "c", "d")
_CONFIG = FederationConfig(num_rounds=100, cohort_size=4, server=ServerConfig(warmup_rounds=0))


def _table(width: int = 3) -> ParameterTable:
    return table_of({"lora.m.A": torch.zeros(2, width), "head.item_bias": torch.zeros(4)})


def _contract(table: ParameterTable) -> UpdateContract:
    return table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")


def _server(cohort_size: int = 4, width: int = 3, **settings: Any) -> Server:
    settings.setdefault("optimizer", ServerOptimizer.AVERAGE)
    settings.setdefault("lr_schedule", "constant")
    stages = settings.pop("stages", ())
    server = ServerConfig(**{"lr_scale": 1.0, "warmup_rounds": 0} | settings)
    config = FederationConfig(num_rounds=100, cohort_size=cohort_size, server=server, stages=stages)
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
    server, total = _server(), WeightedMean()
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
    server, total = _server(weighting=weighting), WeightedMean()
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
    server, total = _server(), WeightedMean()
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
    server, total = _server(cohort_size=2), WeightedMean()
    server.load_state_tensors(server.state_tensors(), 2)
    cohort = server.select_cohort(3)
    outside = next(client for client in _CLIENTS if client not in cohort)
    assert server.receive(total, _update(server, cohort[0], 1.0, 3))
    assert not server.receive(total, _update(server, outside, 1.0, 3))


@pytest.mark.parametrize("aggregator", list(Aggregation))
@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
def test_a_round_without_a_usable_update_changes_nothing_but_its_number(
    optimizer: ServerOptimizer, aggregator: Aggregation
) -> None:
    server = _server(optimizer=optimizer, aggregator=aggregator)
    _play(server, range(1, 3))
    before, total = _snapshot(server), server.new_aggregator()
    assert not server.receive(total, _update(server, "a", math.nan, 3))
    assert not server.receive(total, _update(server, "b", 1e25, 3))
    summary = server.aggregate(total)
    assert (summary.num_updates, summary.loss, summary.update_norm) == (0, None, 0.0)
    assert summary.refused_by_reason == {"not_finite": 1, "too_large": 1}
    assert server.round_under_way == 4
    after = server.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _play(server, range(4, 6))


def test_a_step_that_is_not_finite_leaves_the_state() -> None:
    server, total = _server(optimizer=ServerOptimizer.FEDADAM), WeightedMean()
    server.receive(total, _update(server, "a", 1.0))
    server.aggregate(total)
    before = _snapshot(server)
    huge = WeightedMean()
    huge.add(_update(server, "b", 1e30, 2), 1.0)  # `receive` would refuse it
    with pytest.raises(TrainingError, match="not finite"):
        server.aggregate(huge)
    after = server.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _play(server: Server, rounds: range) -> None:
    for round_number in rounds:
        total = WeightedMean()
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
        Server(table, _contract(other), _CLIENTS, _CONFIG, 0)
    start = other.initial_state()
    with pytest.raises(ContractError, match=r"shared state .*lora\.m\.A is float32\[2, 5\]"):
        Server(table, _contract(table), _CLIENTS, _CONFIG, 0, start)


def test_a_server_starts_from_the_shared_state_that_it_is_given() -> None:
    table = _table()
    start = SharedState({name: value + 2 for name, value in table.initial_state().tensors.items()})
    server = Server(table, _contract(table), _CLIENTS, _CONFIG, 0, start)
    assert server.shared is start


def test_what_is_not_sent_stays_as_it_was() -> None:
    frozen = dataclasses.replace(_table()["lora.m.A"], sent=False)
    table = ParameterTable({**_table(), frozen.name: frozen}.values())
    config = _CONFIG
    server, total = Server(table, _contract(table), _CLIENTS, config, 0), WeightedMean()
    delta = {"head.item_bias": torch.ones(4)}
    assert server.receive(total, server.contract.build("a", 1, 1, 1.0, delta))
    server.aggregate(total)
    assert not server.shared.tensors["lora.m.A"].any()
    assert server.shared.tensors["head.item_bias"].all()


def test_the_config_names_the_aggregator() -> None:
    assert type(_server().new_aggregator()) is WeightedMean
    trimmed = _server(aggregator=Aggregation.TRIMMED_MEAN, trim_share=0.3).new_aggregator()
    for client_id, value in zip(_CLIENTS, (1.0, 2.0, 4.0, 80.0), strict=True):
        delta = {"head.item_bias": torch.tensor([value])}
        trimmed.add(ClientUpdate(client_id, 1, "hash", 1, 0.0, delta), 1.0)
    # 0.3 of four clients is more than one: the two in the middle would be left, as by the median.
    assert trimmed.result()["head.item_bias"].tolist() == [3.0]
    server = _server(aggregator=Aggregation.MEDIAN)
    total = server.new_aggregator()
    for client_id, value in zip(_CLIENTS, (1.0, 2.0, 4.0, 80.0), strict=True):
        assert server.receive(total, _update(server, client_id, value))
    server.aggregate(total)
    assert server.shared.tensors["head.item_bias"].tolist() == [3.0] * 4  # (2 + 4) / 2


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.zeros(4, device="meta"), id="meta"),
        pytest.param(lambda: torch.zeros(4).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.zeros(2, 2).to_sparse_csr(), id="rows"),
        pytest.param(lambda: torch.zeros(4).to_mkldnn(), id="of one library"),
        pytest.param(lambda: _nested(layout=torch.strided), id="nested"),
        pytest.param(lambda: _nested(layout=torch.jagged), id="jagged"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_tensors_without_plain_values_are_refused(make: Callable[[], torch.Tensor]) -> None:
    server, total = _server(), WeightedMean()
    update = _update(server, "a", 1.0)
    odd = dataclasses.replace(update, delta={**update.delta, "head.item_bias": make()})
    assert not server.receive(total, odd)
    assert "head.item_bias is not a dense tensor with values" in total.tally.refusals[0]
    assert server.receive(total, update)


def _nested(layout: torch.layout) -> torch.Tensor:
    made: torch.Tensor = torch.nested.nested_tensor([torch.zeros(2)] * 2, layout=layout)
    return made


def _clipping(norm: float, **settings: Any) -> Server:
    stages = (StageConfig(clip=ClipConfig(norm=norm)),)
    return _server(stages=stages, optimizer=ServerOptimizer.FEDADAM, **settings)


def _poisoned(server: Server, client_id: str, value: float, round_number: int) -> ClientUpdate:
    update = _update(server, client_id, 0.01, round_number)
    bias = update.delta["head.item_bias"].clone()
    bias[2] = value
    return dataclasses.replace(update, delta={**update.delta, "head.item_bias": bias})


@pytest.mark.parametrize("value", [10.0, 1e3, 1e25, 3e38])
def test_one_huge_value_spoils_no_moment_where_updates_are_clipped(value: float) -> None:
    server = _clipping(norm=0.4)
    for round_number in (1, 2, 3):
        total = server.new_aggregator()
        for client_id in _CLIENTS[:3]:
            assert server.receive(total, _update(server, client_id, 0.01, round_number))
        # The stage has bounded it before its norm is judged.
        assert server.receive(total, _poisoned(server, "d", value, round_number))
        summary = server.aggregate(total)
        # Only the update that its client did not clip stands beyond the bound.
        clip = summary.stages["clip"]
        assert clip["clipped"] == 1
        assert clip["largest_norm"] == pytest.approx(value, rel=1e-3)
        assert clip["median_norm"] == pytest.approx(0.01 * math.sqrt(10))
        assert summary.update_norm <= 0.4
    moments = {n: t for n, t in server.state_tensors().items() if n.startswith("second/")}
    # (1 - .99^3) of the square of the mean: at most .4 of one client, .01 of each of three.
    mean = (0.4 + 3 * 0.01) / 4
    assert max(float(t.max()) for t in moments.values()) <= (1 - 0.99**3) * mean**2 * 1.0001


def test_updates_within_the_bound_are_aggregated_as_without_the_stage() -> None:
    plain, clipping = _server(optimizer=ServerOptimizer.FEDADAM), _clipping(norm=100.0)
    _play(plain, range(1, 4))
    _play(clipping, range(1, 4))
    expected, found = plain.state_tensors(), clipping.state_tensors()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_norms_of_all_that_arrived_are_on_record() -> None:
    """Also of an update that was clipped, and of one that was refused for its length."""
    server = _clipping(norm=0.4)
    total = server.new_aggregator()
    for client_id, value in zip(_CLIENTS, (0.01, 0.02, 0.03, 1e5), strict=True):
        server.receive(total, _update(server, client_id, value))
    found = server.aggregate(total).norm_quantiles
    assert found == pytest.approx(
        {
            "p10": math.sqrt(10) * 0.013,
            "median": math.sqrt(10) * 0.025,
            "p90": math.sqrt(10) * (0.03 + 0.7 * (1e5 - 0.03)),
            "largest": math.sqrt(10) * 1e5,
        }
    )
    plain = _server()
    total = plain.new_aggregator()
    assert plain.aggregate(total).norm_quantiles == {}
    assert not plain.receive(total, _update(plain, "a", 1e5, 2))
    assert total.tally.refusals
    assert total.tally.norm_quantiles["largest"] == pytest.approx(math.sqrt(10) * 1e5)


def test_no_stages_no_figures() -> None:
    server, total = _server(), WeightedMean()
    server.receive(total, _update(server, "a", 1.0))
    assert server.aggregate(total).stages == {}
