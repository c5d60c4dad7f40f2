"""Aggregation and the server's step, against arithmetic, float64 brute force and torch.optim."""

import collections
import functools
import itertools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm_llm.base.errors import ContractError, TrainingError
from pfm_llm.config.choices import LearningRateSchedule, ServerOptimizer, Weighting
from pfm_llm.config.schema import ServerConfig
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.server.aggregation import Aggregator, WeightedMean, update_weight
from pfm_llm.server.robust import AGGREGATORS, CoordinateMedian, TrimmedMean
from pfm_llm.server.step import ServerStep

_NAMES = ("lora.m.A", "basis.m.A", "head.user.weight", "head.item_ids.weight", "head.item_bias")

Kind = Callable[[], Aggregator]
EMPTY = [functools.partial(kind.of, ServerConfig()) for kind in AGGREGATORS.values()]
every_kind = pytest.mark.parametrize("kind", EMPTY, ids=AGGREGATORS)


def _random(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(3, 2, generator=source) for name in _NAMES}


def _update(
    client_id: str, delta: dict[str, torch.Tensor], num_examples: int = 1, loss: float = 0.0
) -> ClientUpdate:
    return ClientUpdate(client_id, 1, "hash", num_examples, loss, delta)


def _sum(
    updates: Sequence[ClientUpdate], weights: Sequence[float], kind: Kind = WeightedMean
) -> Aggregator:
    total = kind()
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total


def _step(
    optimizer: ServerOptimizer,
    num_rounds: int = 10,
    rates: Mapping[str, float] = collections.defaultdict(lambda: 1.0),
    **settings: Any,
) -> ServerStep:
    settings.setdefault("lr_schedule", LearningRateSchedule.CONSTANT)
    settings = {"lr_scale": 1.0, "warmup_rounds": 0} | settings
    return ServerStep(ServerConfig(optimizer=optimizer, **settings), num_rounds, rates)


def test_weighted_mean_of_two_updates() -> None:
    updates = [
        _update("a", {"lora.A": torch.tensor([1.0, 0.0])}, num_examples=3, loss=2.0),
        _update("b", {"lora.A": torch.tensor([5.0, 8.0])}, num_examples=1, loss=6.0),
    ]
    total = _sum(updates, [3.0, 1.0])
    # (3 * 1 + 1 * 5) / 4 = 2; (3 * 0 + 1 * 8) / 4 = 2; loss (3 * 2 + 1 * 6) / 4 = 3
    assert total.result()["lora.A"].tolist() == [2.0, 2.0]
    tally = total.tally
    assert tally.loss == 3.0
    assert (tally.num_updates, tally.total_weight, tally.num_examples) == (2, 4.0, 4)
    assert tally.client_ids == ["a", "b"]


def test_median_is_the_middle_or_the_mean_of_the_two_in_the_middle() -> None:
    values = [[1.0, -7.0], [5.0, 8.0], [2.0, 9.0], [4.0, -9.0]]
    updates = [_update(str(v), {"lora.A": torch.tensor(v)}) for v in values]
    three = _sum(updates[:3], [1.0, 1.0, 100.0], CoordinateMedian)
    assert three.result()["lora.A"].tolist() == [2.0, 8.0]
    four = _sum(updates, [1.0] * 4, CoordinateMedian)
    assert four.result()["lora.A"].tolist() == [(2 + 4) / 2, (-7 + 8) / 2]


@pytest.mark.parametrize(
    ("share", "count", "cut"),
    # 0.07 · 100 is a little more than 7 in floating point.
    [
        (0.0, 5, 0),
        (0.2, 5, 1),
        (0.2, 6, 2),
        (0.2, 10, 2),
        (0.07, 100, 7),
        (0.4, 2, 0),
        (0.49, 3, 1),
    ],
)
def test_a_trimmed_mean_leaves_out_the_share_at_each_end(
    share: float, count: int, cut: int
) -> None:
    values = [float(v) for v in (np.arange(count) - 1) ** 3]
    updates = [_update(str(v), {"lora.A": torch.tensor([v])}) for v in reversed(values)]
    total = _sum(updates, [1.0] * count, functools.partial(TrimmedMean, share))
    expected = np.float32(np.mean(values[cut : count - cut]))
    assert total.result()["lora.A"].item() == expected


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 9), percent=st.integers(0, 49))
def test_a_trimmed_mean_is_brute_force_whatever_the_order_grouping_and_weights(
    data: st.DataObject, count: int, percent: int
) -> None:
    deltas = [_random(index, 10.0**index) for index in range(count)]
    weights = [float(index % 3 + 1) for index in range(count)]
    cut = min(-(-percent * count // 100), (count - 1) // 2)
    kind = functools.partial(TrimmedMean, percent / 100)
    for name, found in _in_chunks(kind, deltas, weights, data).items():
        stacked = np.sort(np.stack([delta[name].double().numpy() for delta in deltas]), axis=0)
        expected = stacked[cut : count - cut].mean(axis=0).astype(np.float32)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("hostile", [-1e25, -3.0, 3.0, 1e25])
def test_a_fifth_of_hostile_clients_cannot_leave_the_range_of_the_others(hostile: float) -> None:
    honest = [_random(seed) for seed in range(8)]
    updates = [_update(str(index), delta) for index, delta in enumerate(honest)]
    wrong = {name: torch.full((3, 2), hostile) for name in _NAMES}
    updates += [_update(f"hostile {index}", wrong) for index in range(2)]
    found = _sum(updates, [1.0] * 10, functools.partial(TrimmedMean, 0.2)).result()
    for name in _NAMES:
        values = torch.stack([delta[name] for delta in honest])
        assert (values.min(dim=0).values <= found[name]).all()
        assert (found[name] <= values.max(dim=0).values).all()


def test_weightings() -> None:
    assert update_weight(Weighting.UNIFORM, 17) == 1.0
    assert update_weight(Weighting.NUM_EXAMPLES, 17) == 17.0


@every_kind
@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    scale=st.floats(1e-20, 1e20),
    seed=st.integers(0, 2**16),
)
def test_equal_updates_aggregate_to_themselves(
    kind: Kind, weights: list[int], scale: float, seed: int
) -> None:
    delta = _random(seed, scale)
    updates = [_update(str(index), delta) for index in range(len(weights))]
    found = _sum(updates, [float(weight) for weight in weights], kind).result()
    assert all(torch.equal(found[name], delta[name]) for name in _NAMES)  # to the bit


def _in_chunks(
    kind: Kind, deltas: list[dict[str, torch.Tensor]], weights: list[float], data: st.DataObject
) -> dict[str, torch.Tensor]:
    """The aggregate, with clients in any order and chunks that come from other processes."""
    count = len(deltas)
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=3)) | {0, count})
    total = kind()
    for start, stop in itertools.pairwise(cuts):
        chunk = [_update(str(i), deltas[i]) for i in order[start:stop]]
        partial = _sum(chunk, [weights[i] for i in order[start:stop]], kind)
        total.merge(pickle.loads(pickle.dumps(partial)))
    return total.result()


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 8))
def test_mean_is_brute_force_whatever_the_order_and_grouping(
    data: st.DataObject, count: int
) -> None:
    deltas = [_random(index, 10.0**index) for index in range(count)]
    weights = [float(index % 3 + 1) for index in range(count)]
    for name, mean in _in_chunks(WeightedMean, deltas, weights, data).items():
        stacked = np.stack([delta[name].double().numpy() for delta in deltas])
        expected = np.average(stacked, axis=0, weights=weights).astype(np.float32)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6)
        assert mean.dtype is torch.float32


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 8))
def test_median_is_brute_force_whatever_the_order_grouping_and_weights(
    data: st.DataObject, count: int
) -> None:
    deltas = [_random(index, 10.0**index) for index in range(count)]
    weights = [float(index % 3 + 1) for index in range(count)]
    for name, median in _in_chunks(CoordinateMedian, deltas, weights, data).items():
        stacked = np.stack([delta[name].double().numpy() for delta in deltas])
        expected = np.median(stacked, axis=0).astype(np.float32)
        assert torch.equal(median, torch.from_numpy(expected))  # to the bit


@every_kind
def test_the_order_of_clients_changes_no_bit_where_float64_holds_the_sums(kind: Kind) -> None:
    # Multiples of 2^-20 below 2^10: their sums have fewer than 53 bits.
    deltas = [{n: (t * 2**20).round() / 2**20 for n, t in _random(i).items()} for i in range(5)]
    updates = [_update(str(index), delta) for index, delta in enumerate(deltas)]
    expected = _sum(updates, [1.0] * 5, kind).result()
    for order in itertools.permutations(updates):
        found = _sum(order, [1.0] * 5, kind).result()
        assert all(torch.equal(found[name], expected[name]) for name in _NAMES)


@pytest.mark.parametrize("hostile", [-1e25, 1e3, 1e25])
def test_one_hostile_client_of_eight_moves_the_mean_and_not_the_median(hostile: float) -> None:
    honest = [_random(seed) for seed in range(7)]
    updates = [_update(str(index), delta) for index, delta in enumerate(honest)]
    updates.append(_update("hostile", {name: torch.full((3, 2), hostile) for name in _NAMES}))
    mean, median = (
        _sum(updates, [1.0] * 8, kind).result() for kind in (WeightedMean, CoordinateMedian)
    )
    for name in _NAMES:
        values = torch.stack([delta[name] for delta in honest])
        low, high = values.min(dim=0).values, values.max(dim=0).values
        assert ((low <= median[name]) & (median[name] <= high)).all()
        assert ((mean[name] < low) | (mean[name] > high)).all()


def test_sum_survives_cancellation_that_float32_would_lose() -> None:
    # In float32 1e8 + 1 = 1e8, so the mean of (1e8, 1, -1e8) would be 0 instead of 1/3.
    values = [1e8, 1.0, -1e8]
    updates = [_update(str(v), {"lora.A": torch.tensor([v])}) for v in values]
    assert _sum(updates, [1.0] * 3).result()["lora.A"].item() == pytest.approx(1 / 3)


@every_kind
def test_merge_counts_updates_examples_refusals_and_notes(kind: Kind) -> None:
    first = _sum([_update("a", _random(0), num_examples=2, loss=1.0)], [2.0], kind)
    first.refuse("client 'x': too late")
    first.tally.note({"clip": 0.5})
    first.tally.norms.append(4.0)
    second = _sum([_update("b", _random(1), num_examples=5, loss=8.0)], [5.0], kind)
    second.refuse("client 'y': NaN")
    second.tally.note({"clip": 2.0})
    second.tally.norms += [3.0, 1.0]
    first.merge(second)
    first.merge(kind())
    assert first.tally.client_ids == ["a", "b"]
    assert first.tally.num_examples == 7
    assert first.tally.loss == pytest.approx((2 * 1 + 5 * 8) / 7)
    assert first.tally.refusals == ["client 'x': too late", "client 'y': NaN"]
    assert first.tally.noted == {"clip": [0.5, 2.0]}
    assert second.tally.noted == {"clip": [2.0]}
    assert first.tally.norms == [4.0, 3.0, 1.0]
    assert first.tally.norm_quantiles == pytest.approx(
        {"p10": 1.4, "median": 3.0, "p90": 3.8, "largest": 4.0}
    )
    assert kind().tally.norm_quantiles == {}


@every_kind
def test_what_is_merged_is_not_written_to(kind: Kind) -> None:
    part = _sum([_update("a", _random(0), 3, 1.5)], [3.0], kind)
    part.refuse("client 'x': late")
    part.tally.note({"clip": 0.5})
    before = pickle.loads(pickle.dumps(part))
    total = kind()
    total.merge(part)
    assert total.tally == before.tally
    total.add(_update("b", _random(1)), 1.0)
    total.refuse("client 'y': late")
    total.tally.note({"clip": 1.5})
    assert part.tally == before.tally
    assert part.tally.client_ids == ["a"]
    assert all(torch.equal(part.result()[name], _random(0)[name]) for name in _NAMES)


@every_kind
def test_updates_are_not_changed_or_kept(kind: Kind) -> None:
    update = _update("a", _random(0))
    total = _sum([update], [2.0], kind)
    for tensor in update.delta.values():
        tensor.zero_()
    assert torch.equal(total.result()["lora.m.A"], _random(0)["lora.m.A"])


@every_kind
def test_a_client_is_never_counted_twice(kind: Kind) -> None:
    total = _sum([_update("a", _random(0))], [1.0], kind)
    with pytest.raises(ContractError, match="'a' would be counted twice"):
        total.add(_update("a", _random(1)), 1.0)
    with pytest.raises(ContractError, match="'a' would be counted twice"):
        total.merge(_sum([_update("b", _random(2)), _update("a", _random(1))], [1.0, 1.0], kind))
    assert total.tally.client_ids == ["a"]
    assert torch.equal(total.result()["lora.m.A"], _random(0)["lora.m.A"])


@every_kind
@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"lora.m.A": torch.ones(3, 2)}, "lacks 'basis.m.A'"),
        (_random(0) | {"lora.z": torch.ones(1)}, "unexpected tensor 'lora.z'"),
        (_random(0) | {"head.item_bias": torch.ones(6)}, r"shape \[6\], must be \[3, 2\]"),
    ],
)
def test_a_misfit_changes_nothing(kind: Kind, delta: dict[str, torch.Tensor], message: str) -> None:
    total = _sum([_update("a", _random(0))], [1.0], kind)
    with pytest.raises(ContractError, match=message):
        total.add(_update("b", delta), 1.0)
    assert total.tally.num_updates == 1
    assert all(torch.equal(total.result()[name], _random(0)[name]) for name in _NAMES)


@every_kind
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_positive_numbers(kind: Kind, weight: float) -> None:
    with pytest.raises(ContractError, match="is not a positive number"):
        kind().add(_update("a", _random(0)), weight)


@every_kind
def test_nothing_aggregates_to_nothing(kind: Kind) -> None:
    total = kind()
    total.refuse("client 'x': NaN")
    assert total.tally.loss is None
    with pytest.raises(TrainingError, match="no update was accepted"):
        total.result()


def test_one_client_with_full_weight_is_local_training() -> None:
    start, trained = _random(0), _random(1)
    delta = {name: trained[name] - start[name] for name in _NAMES}
    mean = _sum([_update("a", delta, num_examples=9)], [9.0]).result()
    step, shared = _step(ServerOptimizer.AVERAGE), SharedState(start)
    after, state = step.step(shared, mean, step.initial_state(shared))
    for name in _NAMES:
        torch.testing.assert_close(after.tensors[name], trained[name], rtol=0, atol=1e-6)
    assert (state.step, state.first, state.second) == (1, {}, {})


def _assert_equals_torch(step: ServerStep, torch_optimizer: Any, num_rounds: int = 7) -> None:
    """Run both with aggregate = -gradient; the same points after every round."""
    shared = SharedState(_random(0))
    state = step.initial_state(shared)
    parameters = {name: torch.nn.Parameter(t.clone()) for name, t in shared.tensors.items()}
    optimizer = torch_optimizer(
        [{"params": [p], "lr": step.rates[name]} for name, p in parameters.items()]
    )
    for round_number in range(1, num_rounds + 1):
        aggregate = _random(100 + round_number)
        for name, parameter in parameters.items():
            parameter.grad = -aggregate[name]
        optimizer.step()
        shared, state = step.step(shared, aggregate, state)
        for name, parameter in parameters.items():
            torch.testing.assert_close(shared.tensors[name], parameter.data, rtol=1e-5, atol=1e-6)
    assert state.step == num_rounds


_RATES = dict(zip(_NAMES, (0.01, 0.015, 0.02, 0.04, 0.08), strict=True))


def test_fedadam_is_torch_adam() -> None:
    step = _step(ServerOptimizer.FEDADAM, momentum=0.8, rates=_RATES)
    _assert_equals_torch(step, lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.99), eps=1e-8))


def test_fedadam_with_weight_decay_is_torch_adamw() -> None:
    step = _step(ServerOptimizer.FEDADAM, weight_decay=0.3, rates=_RATES)
    _assert_equals_torch(
        step,
        lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3),
    )


def test_fedavgm_is_torch_sgd_with_momentum() -> None:
    step = _step(ServerOptimizer.FEDAVGM, momentum=0.7, rates=_RATES)
    _assert_equals_torch(step, lambda groups: torch.optim.SGD(groups, momentum=0.7))


def test_fedavgm_without_momentum_and_with_rate_one_is_average() -> None:
    shared, aggregate = SharedState(_random(0)), _random(1)
    average = _step(ServerOptimizer.AVERAGE)
    plain = _step(ServerOptimizer.FEDAVGM, momentum=0.0)
    expected, _ = average.step(shared, aggregate, average.initial_state(shared))
    found, _ = plain.step(shared, aggregate, plain.initial_state(shared))
    assert all(torch.equal(found.tensors[n], expected.tensors[n]) for n in _NAMES)


def test_first_fedadam_step_is_the_learning_rate_of_each_tensor() -> None:
    # After bias correction the first step is lr * sign(aggregate).
    step = _step(ServerOptimizer.FEDADAM, rates=_RATES)
    shared = SharedState({name: torch.zeros(3, 2) for name in _NAMES})
    ones = {name: torch.full((3, 2), -4.0) for name in _NAMES}
    after, _ = step.step(shared, ones, step.initial_state(shared))
    found = {name: after.tensors[name][0, 0].item() for name in _NAMES}
    expected = {name: -rate for name, rate in _RATES.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_weight_decay_shrinks_before_the_step() -> None:
    # average: lr 1, so 2 * (1 - 0.25) + 0.5 = 2
    step = _step(ServerOptimizer.AVERAGE, weight_decay=0.25)
    shared = SharedState({"lora.A": torch.tensor([2.0])})
    after, _ = step.step(shared, {"lora.A": torch.tensor([0.5])}, step.initial_state(shared))
    assert after.tensors["lora.A"].tolist() == [2.0]


def test_schedules() -> None:
    constant = _step(ServerOptimizer.AVERAGE, warmup_rounds=3)
    assert [constant.lr_factor(r) for r in (1, 2, 3, 4, 9)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = _step(ServerOptimizer.AVERAGE, 4, lr_schedule=LearningRateSchedule.COSINE)
    # (1 + cos(pi * (r - 1) / 4)) / 2
    half = math.sqrt(0.5)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0, 0.0]
    assert [cosine.lr_factor(r) for r in range(1, 7)] == pytest.approx(expected, abs=1e-12)


@given(num_rounds=st.integers(1, 50), warmup=st.integers(0, 60))
def test_schedule_is_never_zero_within_the_run(num_rounds: int, warmup: int) -> None:
    step = _step(
        ServerOptimizer.AVERAGE,
        num_rounds,
        lr_schedule=LearningRateSchedule.COSINE,
        warmup_rounds=warmup,
    )
    factors = [step.lr_factor(r) for r in range(1, num_rounds + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    top = min(warmup, num_rounds)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
def test_schedule_scales_the_step(optimizer: ServerOptimizer) -> None:
    step = _step(optimizer, 2, lr_schedule=LearningRateSchedule.COSINE, rates=_RATES)
    shared, aggregate = SharedState({n: torch.zeros(3, 2) for n in _NAMES}), _random(1)
    whole, _ = step.step(shared, aggregate, step.initial_state(shared))
    later = SharedState(shared.tensors, 1)
    half, _ = step.step(later, aggregate, step.initial_state(later))  # factor 1/2
    for name in _NAMES:
        torch.testing.assert_close(half.tensors[name], whole.tensors[name] / 2)


@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
def test_step_leaves_its_arguments_as_they_are(optimizer: ServerOptimizer) -> None:
    step, shared, aggregate = _step(optimizer), SharedState(_random(0)), _random(1)
    state = step.initial_state(shared)
    _, state = step.step(shared, aggregate, state)
    before = [
        {name: tensor.clone() for name, tensor in group.items()}
        for group in (shared.tensors, aggregate, state.first, state.second)
    ]
    once = step.step(shared, aggregate, state)
    after = [shared.tensors, aggregate, state.first, state.second]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[n], new[n]) for n in old)
    again = step.step(shared, aggregate, state)
    assert all(torch.equal(once[0].tensors[n], again[0].tensors[n]) for n in _NAMES)


def test_step_refuses_an_aggregate_that_does_not_fit() -> None:
    step, shared = _step(ServerOptimizer.AVERAGE), SharedState(_random(0))
    state = step.initial_state(shared)
    with pytest.raises(ContractError, match=r"has the unexpected tensor 'private\.x'"):
        step.step(shared, _random(1) | {"private.x": torch.ones(1)}, state)
    with pytest.raises(ContractError, match=r"shape \[1\], must be \[3, 2\]"):
        step.step(shared, _random(1) | {"lora.m.A": torch.ones(1)}, state)


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_step_to_values_that_are_not_finite_is_a_training_error(value: float) -> None:
    # 1e30 squared overflows the second moment, which would silently stop the tensor.
    step, shared = _step(ServerOptimizer.FEDADAM), SharedState(_random(0), 3)
    aggregate = _random(1) | {"head.item_bias": torch.full((3, 2), value)}
    with pytest.raises(TrainingError, match=r"round 4 made head.item_bias not finite"):
        step.step(shared, aggregate, step.initial_state(shared))
