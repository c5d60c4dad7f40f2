"""Steps on stacked tensors equal torch.optim, client by client."""

import pytest
import torch

from pfm_llm.client.local_steps import StackedOptimizer, clip_per_client
from pfm_llm.config.choices import LocalOptimizer

CLIENTS, STEPS = 3, 4
SHAPES = {"a": (2, 3), "b": (5,), "scalar": ()}


def _random(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(CLIENTS, *shape, generator=generator) for n, shape in SHAPES.items()}


@pytest.mark.parametrize("kind", LocalOptimizer)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_steps_equal_torch_optim_one_client_at_a_time(
    kind: LocalOptimizer, max_norm: float | None
) -> None:
    optimizer = StackedOptimizer(kind, 0.1, max_norm)
    stacked = _random(0)
    for step in range(STEPS):
        stacked = optimizer.step(stacked, list(_random(10 + step).values()))
    for client in range(CLIENTS):
        single = {n: v[client].clone().requires_grad_() for n, v in _random(0).items()}
        if kind is LocalOptimizer.SGD:
            expected: torch.optim.Optimizer = torch.optim.SGD(single.values(), lr=0.1)
        else:
            expected = torch.optim.AdamW(single.values(), lr=0.1, weight_decay=0.0)
        for step in range(STEPS):
            for name, gradient in _random(10 + step).items():
                single[name].grad = gradient[client].clone()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(single.values(), max_norm)
            expected.step()
        for name, value in single.items():
            torch.testing.assert_close(stacked[name][client], value, atol=1e-5, rtol=1e-5)


def test_a_step_changes_nothing_that_it_was_given() -> None:
    tensors, gradients = _random(0), list(_random(1).values())
    new = StackedOptimizer(LocalOptimizer.ADAMW, 0.1).step(tensors, gradients)
    assert all(torch.equal(value, _random(0)[name]) for name, value in tensors.items())
    assert all(value.requires_grad and value.is_leaf for value in new.values())


def test_without_tensors_no_step_is_counted() -> None:
    """AdamW's first step moves each entry by lr; a counted empty step would move it further."""
    optimizer = StackedOptimizer(LocalOptimizer.ADAMW, 0.1, max_grad_norm=1.0)
    assert optimizer.step({}, []) == {}
    start = {"x": torch.zeros(2, 3)}
    moved = optimizer.step(start, [torch.full((2, 3), 7.0)])["x"]
    torch.testing.assert_close(moved.detach(), torch.full((2, 3), -0.1))


def test_clipping_is_per_client_over_all_tensors() -> None:
    """Client 0 has norm 5 = |(3, 4)| and is scaled by 2/5; client 1 has norm 1 and stays."""
    first, second = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[[4.0]], [[0.0]]])
    clipped = clip_per_client([first, second], 2.0)
    torch.testing.assert_close(clipped[0], torch.tensor([[1.2, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(clipped[1], torch.tensor([[[1.6]], [[0.0]]]))


def test_clipping_zero_gradients_gives_zeros() -> None:
    (clipped,) = clip_per_client([torch.zeros(2, 3)], 1.0)
    assert torch.equal(clipped, torch.zeros(2, 3))


def test_a_client_whose_gradient_is_not_a_number_does_not_spoil_the_others() -> None:
    gradients = [torch.ones(2, 3)]
    gradients[0][0] = torch.nan
    new = StackedOptimizer(LocalOptimizer.ADAMW, 0.1, 1.0).step(
        {"x": torch.zeros(2, 3)}, gradients
    )["x"]
    assert new[0].isnan().all()
    torch.testing.assert_close(new[1].detach(), torch.full((3,), -0.1))
