"""The bound on the size of updates: honest ones stay as they are, far larger ones do no harm."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.config.choices import Aggregation, LocalOptimizer, ServerOptimizer, Weighting
from pfm_llm.config.schema import FederationConfig, LocalConfig, ServerConfig
from pfm_llm.config.stages import ClipConfig, StageConfig
from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.server.norm_bound import NormBound
from pfm_llm.server.round_summary import RoundSummary
from pfm_llm.server.server import Server
from tests.support.tables import table_of

CLIENTS = tuple("abcdefgh")
BIAS, LORA = "head.item_bias", "lora.m.A"
Change = Callable[[ClientUpdate], ClientUpdate]


def server_of(local: LocalConfig | None = None, stages: Any = (), **settings: Any) -> Server:
    server = ServerConfig(**{"lr_scale": 1.0, "warmup_rounds": 0} | settings)
    local = local or LocalConfig()
    config = FederationConfig(
        num_rounds=100, cohort_size=8, local=local, server=server, stages=stages
    )
    table = table_of({LORA: torch.zeros(2, 3), BIAS: torch.zeros(400)})
    contract = table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
    return Server(table, contract, CLIENTS, config, seed=0)


def honest(server: Server, client_id: str, scale: float = 1.0) -> ClientUpdate:
    """An update like a gradient: another one for each client and round, of like size."""
    round_number = server.round_under_way
    seed = 1000 * round_number + CLIENTS.index(client_id)
    generator = torch.Generator().manual_seed(seed)
    delta = {
        name: scale * 0.01 * torch.randn(spec.shape, generator=generator)
        for name, spec in server.contract.tensors.items()
    }
    return server.contract.build(client_id, round_number, 20, 5.0, delta)


def play(server: Server, rounds: int, hostile: Change | None = None) -> list[RoundSummary]:
    """Rounds of all clients; ``hostile`` changes the update of the last one."""
    summaries = []
    for _ in range(rounds):
        updates = server.new_aggregator()
        for client_id in CLIENTS:
            update = honest(server, client_id)
            if hostile is not None and client_id == CLIENTS[-1]:
                update = hostile(update)
            server.receive(updates, update)
        summaries.append(server.aggregate(updates))
    return summaries


def scaled(factor: float, *names: str) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        delta = {
            n: t * factor if n in (names or update.delta) else t for n, t in update.delta.items()
        }
        return dataclasses.replace(update, delta=delta)

    return change


def entry(value: float, name: str = BIAS, place: int = 347) -> Change:
    def change(update: ClientUpdate) -> ClientUpdate:
        tensor = update.delta[name].clone()
        tensor.view(-1)[place] = value
        return dataclasses.replace(update, delta={**update.delta, name: tensor})

    return change


HOSTILE = {
    "an entry of 1e25": entry(1e25),
    "an entry of 1000": entry(1000.0),
    "an entry of -1000": entry(-1000.0),
    "the largest float": entry(3e38, LORA, 0),
    "all of it a million times too large": scaled(1e6),
    "a small tensor a million times too large": scaled(1e6, LORA),
}


def equal(one: Server, other: Server, *prefixes: str) -> bool:
    found, expected = one.state_tensors(), other.state_tensors()
    assert found.keys() == expected.keys()
    return all(
        torch.equal(found[name], expected[name])
        for name in expected
        if not prefixes or name.startswith(prefixes)
    )


@pytest.mark.parametrize("optimizer", list(ServerOptimizer))
@pytest.mark.parametrize("aggregator", list(Aggregation))
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("met", [0, 3], ids=["in the first round", "later"])
def test_an_update_that_is_far_too_large_leaves_no_trace(
    optimizer: ServerOptimizer, aggregator: Aggregation, change: Change, met: int
) -> None:
    settings = {"optimizer": optimizer, "aggregator": aggregator}
    attacked, without = server_of(**settings), server_of(**settings)
    play(attacked, met)
    play(without, met)
    [summary] = play(attacked, 1, change)
    # The same round, in which that client gives no answer.
    [expected] = play(without, 1, lambda update: dataclasses.replace(update, client_id="stranger"))
    assert summary.refused_by_reason == {"too_large": 1}
    assert summary.num_updates == 7
    assert "client 'h': the " in summary.refusals[0]
    assert summary.update_norm == expected.update_norm
    assert equal(attacked, without)
    play(attacked, 2)
    play(without, 2)
    assert equal(attacked, without)


@pytest.mark.parametrize("stages", [(), (StageConfig(clip=ClipConfig(norm=1e9)),)])
def test_an_update_that_is_too_large_is_scaled_down_as_a_whole(stages: Any) -> None:
    server = server_of(optimizer=ServerOptimizer.AVERAGE, stages=stages)
    play(server, 3)
    updates = server.new_aggregator()
    large = scaled(70.0)(honest(server, "a"))
    assert server.receive(updates, large)
    found = updates.result()
    factor = float(found[BIAS].norm() / large.delta[BIAS].norm())
    # 50 times an honest norm; honest ones differ a little, and a single entry of few numbers more.
    assert 50 / 70 / 3 < factor < 50 / 70 * 1.05
    for name, tensor in found.items():
        assert torch.allclose(tensor, large.delta[name] * factor, rtol=1e-5)
    assert server.aggregate(updates).num_clipped == 1


@pytest.mark.parametrize("factor", [0.0, 1e-6, 0.1, 1.0, 10.0])
def test_honest_updates_are_aggregated_to_the_bit(factor: float) -> None:
    server = server_of(optimizer=ServerOptimizer.AVERAGE)
    play(server, 3)
    updates, plain = server.new_aggregator(), server.new_aggregator()
    for client_id in CLIENTS:
        update = scaled(factor)(honest(server, client_id))
        assert server.receive(updates, update)
        plain.add(update, 1.0)
    found, expected = updates.result(), plain.result()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert server.aggregate(updates).num_clipped == 0


def test_the_bounds_follow_honest_updates_that_grow_or_shrink() -> None:
    server = server_of()
    for scale in (*(1.3**n for n in range(40)), *(1.3 ** (40 - n) for n in range(80))):
        updates = server.new_aggregator()
        assert all(server.receive(updates, honest(server, c, scale)) for c in CLIENTS)
        assert server.aggregate(updates).num_clipped == 0


def test_a_tensor_that_begins_to_move_late_is_honest() -> None:
    """As the factors A of a LoRA, whose gradient is zero, and then tiny, before B has moved."""
    server = server_of()
    for value in (0.0, 0.0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3):
        updates = server.new_aggregator()
        for client_id in CLIENTS:
            assert server.receive(updates, scaled(value, LORA)(honest(server, client_id)))
        assert server.aggregate(updates).num_clipped == 0


@pytest.mark.parametrize(
    "order", list(itertools.islice(itertools.permutations(range(8)), 0, 40000, 9999))
)
def test_neither_the_order_of_updates_nor_the_chunks_change_the_bounds(
    order: Sequence[int],
) -> None:
    one, other = server_of(), server_of()
    for _ in range(3):
        total, updates = one.new_aggregator(), other.new_aggregator()
        chunks = [one.new_aggregator(), one.new_aggregator()]
        for place, index in enumerate(order):
            one.receive(chunks[place % 2], honest(one, CLIENTS[index]))
        for chunk in chunks:
            total.merge(chunk)
        for client_id in CLIENTS:
            other.receive(updates, honest(other, client_id))
        one.aggregate(total)
        other.aggregate(updates)
    assert equal(one, other, "norm_bound/")


def test_sizes_of_one_client_cannot_be_told_from_those_of_others() -> None:
    """Each size is sorted on its own: the number of examples tells nothing of the norms."""
    server, updates = server_of(), server_of().new_aggregator()
    for number, client_id in enumerate(CLIENTS):
        update = honest(server, client_id, scale=2.0**-number)
        assert server.receive(updates, dataclasses.replace(update, num_examples=number + 1))
    server.aggregate(updates)
    kept = server.state_tensors()["norm_bound/sizes"][:, -len(CLIENTS) :]
    assert torch.equal(kept, kept.sort(dim=1).values)
    assert kept[-1].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # of the longest update the 1


def test_a_large_cohort_is_represented_by_all_of_its_range() -> None:
    bound = NormBound(server_of().contract.tensors, LocalConfig())
    bound.learn([torch.full((6,), size).double() for size in range(1, 1001)])
    middle = bound.state.median(dim=1).values
    assert bool(((middle > 450) & (middle < 550)).all())


def test_a_resumed_server_has_the_same_bounds() -> None:
    whole = server_of()
    play(whole, 5, scaled(70.0))
    first, second = server_of(), server_of()
    play(first, 3, scaled(70.0))
    second.load_state_tensors(first.state_tensors(), 3)
    play(second, 2, scaled(70.0))
    assert equal(whole, second)


def test_a_checkpoint_of_version_0_2_has_no_sizes_and_can_be_read() -> None:
    server, again = server_of(), server_of()
    play(server, 2)
    saved = server.state_tensors()
    del saved["norm_bound/sizes"]
    again.load_state_tensors(saved, 2)
    assert equal(server, again, "shared/", "first/", "second/")
    assert not again.state_tensors()["norm_bound/sizes"].any()


@pytest.mark.parametrize(
    ("local", "least", "most"),
    [
        (LocalConfig(), 250.0, 350.0),
        (LocalConfig(shared_lr=0.1, shared_local_steps=2), 50.0, 70.0),
        (LocalConfig(max_grad_norm=2.0), 2.0, 2.1),
        # A hundred thousand numbers that all move by their rate in each of four steps.
        (
            LocalConfig(
                shared_optimizer=LocalOptimizer.ADAMW, shared_lr=1e-3, shared_local_steps=4
            ),
            4e-3 * 400**0.5,
            10.1 * 4e-3 * 400**0.5,
        ),
    ],
)
def test_the_first_bounds_follow_from_the_local_training(
    local: LocalConfig, least: float, most: float
) -> None:
    bound = NormBound(server_of().contract.tensors, local)

    def of_norm(norm: float) -> dict[str, torch.Tensor]:
        return {LORA: torch.zeros(2, 3), BIAS: torch.full((400,), norm / 20)}

    bound.bounded("a", of_norm(least * 0.99), 1)
    with pytest.raises(ContractError, match=r"client 'a': the .*max_grad_norm"):
        bound.bounded("a", of_norm(most * 1.01), 1)


def test_a_weight_that_nobody_can_have_is_refused() -> None:
    server = server_of(weighting=Weighting.NUM_EXAMPLES)
    play(server, 2)

    def claims(number: int) -> Change:
        return lambda update: dataclasses.replace(update, num_examples=number)

    [summary] = play(server, 1, claims(2**31 - 1))
    assert summary.refused_by_reason == {"too_large": 1}
    assert "its num_examples is 2.15e+09" in summary.refusals[0]
    [summary] = play(server, 1, claims(100_000))
    assert summary.refused_by_reason == {}
    assert summary.num_clipped == 0


def test_one_client_of_eight_that_lies_for_sixty_rounds_moves_an_item_little() -> None:
    """With entries of 1000 it is refused, with any less it is held near the others."""
    moved = {}
    for value in (1000.0, 500.0, 5.0, 2.0):
        server = server_of(optimizer=ServerOptimizer.AVERAGE)
        play(server, 3)
        play(server, 60, entry(value))
        moved[value] = float(server.shared.tensors[BIAS][347])
    assert abs(moved[1000.0]) < 0.1
    # At most 50 times a largest entry of about .03, an eighth of it, in 60 rounds.
    assert max(moved.values()) < 60 * 50 * 0.04 / 8
    assert math.isfinite(sum(moved.values()))


def test_a_tensor_that_wakes_up_is_honest() -> None:
    """A tensor behind one that starts at zero: its gradient grows a thousandfold in few rounds."""
    server = server_of()
    for strength in (1e-5, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0):
        updates = server.new_aggregator()
        for client_id in CLIENTS:
            update = scaled(strength, LORA)(honest(server, client_id))
            assert server.receive(updates, update)
        assert server.aggregate(updates).num_clipped == 0
