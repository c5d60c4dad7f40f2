"""Noise on the sum of a round: how much, from where, and what must not steer it."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pfm_llm.base.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    CorruptFileError,
    TrainingError,
)
from pfm_llm.config.schema import FederationConfig
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import ClientUpdate, NodeUpdate
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.participation import select_cohort
from pfm_llm.server.privacy.ledger import Ledger
from pfm_llm.server.privacy.mechanism import PrivateMean
from pfm_llm.server.privacy.noise import KEY_BYTES, SecretStream
from pfm_llm.server.server import Server
from tests.support.privacy import count_in_place_of_epsilon, private_federation
from tests.support.tables import table_of

CLIENTS = tuple(f"user-{number:02d}" for number in range(10))
# Keys that everybody knows protect nobody: they are for tests alone.
KEY, SECRET = bytes(KEY_BYTES), bytes(range(KEY_BYTES))
LARGE = {"lora.m.A": torch.zeros(300, 400)}
SMALL = {"lora.m.A": torch.zeros(2, 3), "head.item_bias": torch.zeros(4)}


def server_of(
    config: FederationConfig, tensors: dict[str, torch.Tensor] = SMALL, key: bytes = KEY
) -> Server:
    """A server that has begun with a ledger in memory."""
    table: ParameterTable = table_of(tensors)
    contract = table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
    server = Server(table, contract, CLIENTS, config, seed=0)
    if server.privacy is not None:
        server.privacy.start(server.privacy.new_ledger(SECRET), key)
    return server


def mechanism_of(server: Server) -> PrivateMean:
    assert server.privacy is not None
    return server.privacy


def update_of(server: Server, client_id: str, value: float, **fields: Any) -> ClientUpdate:
    delta = {n: torch.full_like(t, value) for n, t in server.shared.tensors.items()}
    round_number = server.round_under_way
    update = server.contract.build(client_id, round_number, 1, 0.5, delta)
    return dataclasses.replace(update, **fields)


def step(server: Server, updates: WeightedMean | None = None) -> dict[str, torch.Tensor]:
    """Release and step; how the shared tensors moved."""
    before = server.shared.tensors
    mechanism_of(server).charge(server.round_under_way)
    server.aggregate(WeightedMean() if updates is None else updates)
    return {name: after - before[name] for name, after in server.shared.tensors.items()}


def test_the_noise_has_the_deviation_that_is_promised() -> None:
    server = server_of(private_federation(norm=3.0, noise_multiplier=2.0), LARGE)
    moved = step(server)["lora.m.A"].double()
    expected = 2.0 * 3.0 / 4  # z C / n
    assert mechanism_of(server).sensitivity == pytest.approx(3.0, rel=1e-4)
    # 120,000 numbers: the deviation is known to one in 490.
    assert float(moved.std()) == pytest.approx(expected, rel=0.01)
    assert abs(float(moved.mean())) < 4 * expected / math.sqrt(moved.numel())
    assert stats.kstest(moved.flatten().numpy() / expected, "norm").pvalue > 1e-3


def test_the_mean_is_over_the_cohort_and_not_over_those_who_answered() -> None:
    # Noise of 1e-9 leaves the mean readable: one of four has answered.
    server = server_of(private_federation(norm=100.0, noise_multiplier=1e-9))
    updates, cohort = WeightedMean(), server.select_cohort(1)
    assert server.receive(updates, update_of(server, cohort[0], 2.0))
    moved = step(server, updates)
    for tensor in moved.values():
        assert tensor.numpy() == pytest.approx(np.full(tensor.shape, 0.5), abs=1e-5)


def test_a_round_without_an_answer_releases_noise_and_counts() -> None:
    server = server_of(private_federation())
    moved = step(server)
    assert all(bool(tensor.abs().min() > 0) for tensor in moved.values())
    assert (server.num_steps, mechanism_of(server).num_releases) == (1, 1)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=10, max_size=10),
    others=st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3),
    norm=st.floats(1e-3, 1e3),
)
def test_what_one_client_gives_moves_the_mean_by_no_more_than_clip_over_cohort(
    values: list[float], others: list[float], norm: float
) -> None:
    """With the same noise, once with a client and once without."""
    released = []
    for is_there in (True, False):
        server = server_of(private_federation(norm=norm, noise_multiplier=1e-3))
        updates, cohort = WeightedMean(), server.select_cohort(1)
        for client_id, value in zip(cohort[1:], others, strict=True):
            assert server.receive(updates, update_of(server, client_id, value))
        if is_there:
            flat = torch.tensor(values)
            delta = {"lora.m.A": flat[:6].view(2, 3), "head.item_bias": flat[6:]}
            assert server.receive(updates, update_of(server, cohort[0], 0.0, delta=delta))
        mechanism_of(server).charge(1)
        released.append(mechanism_of(server).release(updates, server.contract.tensors, 1))
    difference = [released[0][name].double() - released[1][name].double() for name in SMALL]
    moved = math.hypot(*(float(tensor.norm()) for tensor in difference))
    largest = max(float(tensor.abs().max()) for one in released for tensor in one.values())
    rounding = 2**-24 * largest * 2 * math.sqrt(10)  # of what is released, after the noise
    assert moved <= norm / 4 + rounding


def test_a_stage_after_which_an_update_is_long_does_not_lengthen_what_is_summed() -> None:
    server = server_of(private_federation(norm=1.0))
    long = {name: torch.full_like(t, 50.0) for name, t in SMALL.items()}
    bounded = mechanism_of(server).bounded("user-00", long)
    assert math.hypot(*(float(t.double().norm()) for t in bounded.values())) <= 1.0
    with pytest.raises(ContractError, match="not finite"):
        mechanism_of(server).bounded("user-00", {"head.item_bias": torch.tensor([math.nan])})


def test_a_node_s_sum_may_move_by_the_rounding_that_the_sensitivity_counts() -> None:
    config = private_federation(norm=1.0, cohort_size=8)
    sensitivities = []
    for is_there in (True, False):
        server = server_of(config)
        cohort, updates = server.select_cohort(1), WeightedMean()
        count = 8 if is_there else 7
        each = torch.full((4,), 0.5 * (1 - 1e-6))  # norm just below 1
        delta = {"lora.m.A": torch.zeros(2, 3), "head.item_bias": (each.double() * count).float()}
        node = NodeUpdate("n01", 1, server.contract.hash(), count, count, 0.5, delta)
        assert server.receive_sum(updates, node, cohort)
        sensitivities.append(updates.summed()["head.item_bias"])
    moved = float((sensitivities[0] - sensitivities[1]).norm())
    assert moved <= mechanism_of(server).sensitivity


def test_under_masks_the_rounding_of_words_is_part_of_the_sensitivity() -> None:
    plain = mechanism_of(server_of(private_federation(cohort_size=4)))
    config = private_federation(cohort_size=4)
    masked = FederationConfig.model_validate(config.model_dump() | {"masks": True})
    server = server_of(masked)
    fixed_point = server.new_masked_round({}).fixed_point
    expected = 0.5 / fixed_point.scale * math.sqrt(10)
    assert mechanism_of(server).sensitivity - plain.sensitivity == pytest.approx(expected, rel=1e-6)


def test_nothing_of_one_round_decides_what_is_refused_in_the_next() -> None:
    server = server_of(private_federation(norm=1e3))
    for round_number in range(1, 9):
        updates = WeightedMean()
        for client_id in server.select_cohort(round_number):
            server.receive(updates, update_of(server, client_id, 1e-6))
        step(server, updates)
    assert not bool(server.state_tensors()["norm_bound/sizes"].any())
    updates, cohort = WeightedMean(), server.select_cohort(9)
    # The bound on norms would refuse an update that is a million times those before it.
    assert server.receive(updates, update_of(server, cohort[0], 1.0, num_examples=10**6))


def test_noise_is_new_for_each_release_and_each_start() -> None:
    same, other = (server_of(private_federation(), key=key) for key in (KEY, SECRET))
    first, second, elsewhere = step(same), step(same), step(other)
    for name in SMALL:
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], elsewhere[name])


def test_a_round_that_is_released_again_has_other_noise_under_the_same_key() -> None:
    server = server_of(private_federation())
    mechanism, specs = mechanism_of(server), server.contract.tensors
    found = []
    for _ in range(2):
        mechanism.charge(1)
        found.append(mechanism.release(WeightedMean(), specs, 1)["head.item_bias"])
    assert not torch.equal(*found)
    assert mechanism.num_releases == 2


def test_a_release_that_was_not_paid_for_is_refused() -> None:
    server = server_of(private_federation())
    with pytest.raises(TrainingError, match="round 1 is to be charged"):
        server.aggregate(WeightedMean())
    step(server)
    with pytest.raises(TrainingError, match="round 2 is to be charged"):
        server.aggregate(WeightedMean())
    assert server.shared.round_number == 1


def test_without_a_ledger_nothing_is_released() -> None:
    table = table_of(SMALL)
    contract = table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
    server = Server(table, contract, CLIENTS, private_federation(), seed=0)
    with pytest.raises(ConfigError, match="needs a ledger"):
        server.aggregate(WeightedMean())


def test_without_privacy_every_bit_is_as_before() -> None:
    tree = private_federation(norm=5.0).model_dump(exclude={"privacy"})
    server = server_of(FederationConfig.model_validate(tree))
    updates = WeightedMean()
    for place, client_id in enumerate(server.select_cohort(1)):
        assert server.receive(updates, update_of(server, client_id, 0.1 * place))
    expected = updates.result()
    server.aggregate(updates)
    assert all(torch.equal(server.shared.tensors[name], expected[name]) for name in SMALL)
    assert not any(name.startswith("privacy") for name in server.state_tensors())


@pytest.mark.parametrize(("num_clients", "cohort_size"), [(10, 4), (10, 3), (10, 10), (7, 5)])
def test_no_user_is_in_more_rounds_of_passes_than_are_counted(
    num_clients: int, cohort_size: int
) -> None:
    clients = CLIENTS[:num_clients]
    mechanism = PrivateMean(private_federation(cohort_size=cohort_size), clients, seed=3)
    met: Counter[str] = Counter()
    for round_number in range(1, 40):
        met.update(select_cohort(clients, cohort_size, 3, round_number))
        assert mechanism._count([1] * round_number) == max(met.values())


def test_a_round_that_is_released_again_is_counted_for_those_who_are_in_it() -> None:
    mechanism = PrivateMean(private_federation(cohort_size=5), CLIENTS, seed=0)
    assert mechanism._count([1, 1]) == 1
    assert mechanism._count([3, 1]) == 3  # 1 of a pass, and 2 again
    # Two halves of a pass, each again: no user is in both.
    assert mechanism._count([2, 2]) == 2
    poisson = PrivateMean(private_federation(participation="poisson"), CLIENTS, seed=0)
    assert poisson._count([3, 1]) == 4


def test_poisson_draws_each_user_alone_and_in_secret() -> None:
    config = private_federation(cohort_size=3, participation="poisson")
    server = server_of(config)
    mechanism = mechanism_of(server)
    cohorts = [mechanism.drawn_cohort(number) or () for number in range(1, 2001)]
    assert server.select_cohort(1) == cohorts[0]
    met = Counter(client_id for cohort in cohorts for client_id in cohort)
    # 2,000 draws at .3: a deviation of 20.5 around 600.
    assert all(abs(met[client_id] - 600) < 85 for client_id in CLIENTS)
    together = sum({"user-00", "user-01"} <= {*cohort} for cohort in cohorts)
    assert abs(together - 180) < 55
    assert len({len(cohort) for cohort in cohorts}) > 3
    other = PrivateMean(config, CLIENTS, seed=0)
    other.start(other.new_ledger(KEY), KEY)  # the same seed, another secret
    assert [other.drawn_cohort(n) for n in range(1, 21)] != cohorts[:20]


def test_a_poisson_round_that_is_released_again_is_drawn_again() -> None:
    server = server_of(private_federation(cohort_size=5, participation="poisson"))
    mechanism = mechanism_of(server)
    first = mechanism.drawn_cohort(1)
    assert mechanism.drawn_cohort(1) == first
    mechanism.charge(1)
    assert mechanism.drawn_cohort(1) != first


def test_a_stream_is_aes_in_counter_mode_and_even() -> None:
    numbers = SecretStream(KEY, 5).uniform(200_000)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    again = SecretStream(KEY, 5).uniform(3)
    assert again.tolist() == numbers[:3].tolist()
    assert SecretStream(KEY, 6).uniform(3).tolist() != again.tolist()
    # NIST's AES-256 of a block of zeros under a key of zeros: dc95c078a2408989 …
    word = int.from_bytes(bytes.fromhex("dc95c078a2408989"), "little")
    assert SecretStream(KEY, 0).uniform(1)[0] == ((word >> 12) + 0.5) * 2.0**-52


def test_a_ledger_comes_back_as_it_was_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "server" / "privacy.json"
    assert Ledger.read(path) is None
    ledger = Ledger(path, 1.25, SECRET, "who")
    for round_number in (1, 2, 4, 2):
        ledger.charge(round_number)
    found = Ledger.read(path)
    assert found == ledger
    assert (ledger.releases, ledger.total) == ([1, 2, 0, 1], 4)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change", [{"releases": [-1]}, {"secret": "00"}, {"noise_multiplier": "much"}, {"releases": 3}]
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "privacy.json"
    Ledger(path, 1.0, SECRET, "who", [1]).write()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFileError, match=r"privacy\.json is damaged.*restore it"):
        Ledger.read(path)


def test_a_ledger_that_lags_behind_the_checkpoint_is_refused() -> None:
    server = server_of(private_federation())
    for _ in range(3):
        step(server)
    later = server_of(private_federation())
    later.load_state_tensors(server.state_tensors(), 3)
    mechanism = mechanism_of(later)
    with pytest.raises(CheckpointError, match="knows of 2 releases and the checkpoint of 3"):
        mechanism.start(Ledger(None, 1.0, SECRET, mechanism.schedule, [1, 1]), KEY)
    mechanism.start(Ledger(None, 1.0, SECRET, mechanism.schedule, [1, 1, 1]), KEY)


def test_a_ledger_of_other_clients_is_refused() -> None:
    ledger = PrivateMean(private_federation(), CLIENTS, seed=0).new_ledger(SECRET)
    PrivateMean(private_federation(), CLIENTS[::-1], seed=0).start(ledger, KEY)
    for other in (
        PrivateMean(private_federation(), CLIENTS[1:], seed=0),
        PrivateMean(private_federation(), CLIENTS, seed=1),
        PrivateMean(private_federation(cohort_size=5), CLIENTS, seed=0),
        PrivateMean(private_federation(participation="poisson"), CLIENTS, seed=0),
    ):
        with pytest.raises(CheckpointError, match="of other clients or cohorts"):
            other.start(ledger, KEY)


def test_what_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    count_in_place_of_epsilon(monkeypatch)
    server = server_of(private_federation(norm=0.5, cohort_size=5, max_epsilon=9.0))
    for _ in range(5):
        step(server)
    spent = mechanism_of(server).spent()
    assert (spent.epsilon, spent.delta, spent.releases, spent.budget) == (3.0, 1e-5, 5, 9.0)
    assert (spent.clip_norm, spent.cohort_size, spent.num_clients) == (0.5, 5, 10)


def test_the_budget_ends_before_the_round_that_exceeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    count_in_place_of_epsilon(monkeypatch)
    # Ten users in fives: each takes part in every second round.
    mechanism = mechanism_of(server_of(private_federation(cohort_size=5, max_epsilon=7.0)))
    assert mechanism.admitted(1) == 14
    mechanism = mechanism_of(server_of(private_federation(cohort_size=5, max_epsilon=50.0)))
    assert mechanism.admitted(1) == 100
    mechanism = mechanism_of(server_of(private_federation(cohort_size=5, max_epsilon=0.5)))
    assert mechanism.admitted(1) == 0
    mechanism = mechanism_of(server_of(private_federation(cohort_size=5, max_epsilon=7.0)))
    for round_number in (1, 2, 3, 4):
        mechanism.charge(round_number)
    assert mechanism.admitted(3) == 12  # the second pass was paid for twice
    assert mechanism.admitted(5) == 14


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"delta": 0.2}, "gives one of them away"), ({"cohort_size": 11}, "there are 10 clients")],
)
def test_what_does_not_fit_the_clients_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        PrivateMean(private_federation(**settings), CLIENTS, seed=0)
