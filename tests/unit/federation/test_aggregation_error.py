"""The aggregation error against dense float64 products, alpha / r included."""

import pytest
import torch

from pfm_llm.federation.aggregation_error import Factors, aggregation_error, factors_of

IN, OUT, RANK = 7, 5, 2
SCALE = 16 / 8


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _clients(same: str = "") -> list[tuple[float, Factors]]:
    clients = []
    for client, weight in enumerate((1.0, 3.0, 2.0)):
        own: Factors = {}
        for index, module in enumerate(("q", "v")):
            seeds = [0 if same == factor else 10 * client + 1 for factor in "AB"]
            own[module] = (
                _random(RANK, IN, seed=seeds[0] + 100 * index),
                _random(OUT, RANK, seed=seeds[1] + 100 * index + 5),
            )
        clients.append((weight, own))
    return clients


def test_it_equals_the_dense_computation() -> None:
    """Scaling every product by alpha / r cancels."""
    clients = _clients()
    difference = norm = 0.0
    for module in clients[0][1]:
        weights = torch.tensor([weight for weight, _ in clients], dtype=torch.float64) / 6
        a = torch.stack([own[module][0] for _, own in clients]).double()
        b = torch.stack([own[module][1] for _, own in clients]).double()
        products = SCALE * torch.einsum("u,uor,uri->oi", weights, b, a)
        averaged = (
            SCALE * torch.einsum("u,uor->or", weights, b) @ torch.einsum("u,uri->ri", weights, a)
        )
        difference += float((products - averaged).square().sum())
        norm += float(products.square().sum())
    assert aggregation_error(clients) == pytest.approx((difference / norm) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("same", ["A", "B"])
def test_it_vanishes_where_the_clients_share_a_factor(same: str) -> None:
    error = aggregation_error(_clients(same))
    assert error == pytest.approx(0, abs=1e-6)
    assert aggregation_error(_clients()) != pytest.approx(0, abs=1e-2)


def test_nothing_learned_and_nobody() -> None:
    zero = [(1.0, {"q": (_random(RANK, IN, seed=1), torch.zeros(OUT, RANK))})]
    assert aggregation_error(zero) is None
    assert aggregation_error([]) is None


def test_factors_are_what_was_received_and_its_change() -> None:
    tensors = {
        "lora.q.A": torch.ones(RANK, IN),
        "lora.q.B": torch.ones(OUT, RANK),
        "head.x": torch.ones(1),
    }
    found = factors_of(tensors, {"lora.q.B": torch.full((OUT, RANK), 2.0)})
    assert set(found) == {"q"}
    a, b = found["q"]
    assert torch.equal(a, tensors["lora.q.A"])
    assert torch.equal(b, torch.full((OUT, RANK), 3.0))
