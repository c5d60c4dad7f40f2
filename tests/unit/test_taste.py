"""Taste vectors: the closed form against a dense reference, cross-fitting, and the prior."""

import math

import pytest
import torch
import torch.nn.functional as F

from pfm_llm import taste
from pfm_llm.choices import ItemIds, Task
from pfm_llm.config import HeadConfig, TasteConfig
from pfm_llm.head import ITEM_IDS

ITEMS, RANK, POSITIONS = 13, 3, 11
BOTH = (Task.NEXT_ITEM, Task.LIKE)
HEAD = HeadConfig(dim=8, id_dim=4)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _targets(seed: int = 5) -> torch.Tensor:
    return torch.randint(ITEMS, (POSITIONS,), generator=torch.Generator().manual_seed(seed))


def test_the_next_item_fit_is_one_newton_step_of_the_penalised_loss() -> None:
    """Gradient and Hessian by automatic differentiation, float64."""
    scores, targets, features = _random(POSITIONS, ITEMS), _targets(), _random(ITEMS, RANK, seed=1)
    precisions = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)

    def loss(vector: torch.Tensor) -> torch.Tensor:
        own = F.cross_entropy(scores + features @ vector, targets, reduction="sum")
        return own + 0.5 * (precisions * vector.square()).sum()

    zero = torch.zeros(RANK, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    hessian = torch.autograd.functional.hessian(loss, zero)
    whole = torch.zeros(POSITIONS, dtype=torch.long)
    fitted = taste.fit_next_item(scores, targets, features, precisions, whole)
    torch.testing.assert_close(fitted[-1], -torch.linalg.solve(hessian, gradient))


def test_a_row_is_fitted_without_its_fold() -> None:
    """Leaving a fold out of the sums equals leaving its positions out of the data."""
    scores, targets, features = _random(POSITIONS, ITEMS), _targets(), _random(ITEMS, RANK, seed=1)
    precisions = torch.full((RANK,), 2.0, dtype=torch.float64)
    fold = taste.folds(POSITIONS, 3)
    fitted = taste.fit_next_item(scores, targets, features, precisions, fold)
    assert len(fitted) == 4
    for left_out in range(3):
        kept = fold != left_out
        alone = taste.fit_next_item(
            scores[kept], targets[kept], features, precisions, torch.zeros(int(kept.sum())).long()
        )
        torch.testing.assert_close(fitted[left_out], alone[-1])


def test_the_fit_of_likes_comes_near_the_minimum() -> None:
    logits, features = _random(POSITIONS) * 0.5, _random(POSITIONS, RANK, seed=2)
    liked = (_random(POSITIONS, seed=3) > 0).double()
    precisions = torch.full((RANK,), 4.0, dtype=torch.float64)
    vector = torch.zeros(RANK, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([vector], lr=1.0, max_iter=200, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        own = F.binary_cross_entropy_with_logits(logits + features @ vector, liked, reduction="sum")
        loss = own + 0.5 * (precisions * vector.square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    whole = torch.zeros(POSITIONS, dtype=torch.long)
    fitted = taste.fit_likes(logits, liked, features, precisions, whole)
    torch.testing.assert_close(fitted[-1], vector.detach(), atol=1e-3, rtol=0)


def test_likes_too_are_fitted_without_their_fold() -> None:
    logits, features = _random(POSITIONS), _random(POSITIONS, RANK, seed=2)
    liked = (_random(POSITIONS, seed=3) > 0).double()
    precisions = torch.full((RANK,), 1.0, dtype=torch.float64)
    fold = taste.folds(POSITIONS, 4)
    fitted = taste.fit_likes(logits, liked, features, precisions, fold)
    kept = fold != 2
    alone = taste.fit_likes(
        logits[kept], liked[kept], features[kept], precisions, torch.zeros(int(kept.sum())).long()
    )
    torch.testing.assert_close(fitted[2], alone[-1])


def test_without_data_the_vector_is_zero_and_with_little_it_is_small() -> None:
    features = _random(ITEMS, RANK, seed=1)
    precisions = torch.full((RANK,), 2.0, dtype=torch.float64)
    none = taste.fit_next_item(
        torch.zeros(0, ITEMS).double(), torch.zeros(0).long(), features, precisions,
        torch.zeros(0).long(),
    )  # fmt: skip
    assert torch.equal(none, torch.zeros(1, RANK, dtype=torch.float64))
    norms = []
    for count in (1, 4, POSITIONS):
        same = torch.zeros(count, dtype=torch.long)
        fitted = taste.fit_next_item(
            torch.zeros(count, ITEMS).double(), same, features, precisions, same
        )
        norms.append(float(fitted[-1].norm()))
    assert 0 < norms[0] < norms[1] < norms[2]
    lone = taste.fit_next_item(
        torch.zeros(1, ITEMS).double(), torch.zeros(1).long(), features, precisions,
        taste.folds(1, 4),
    )  # fmt: skip
    assert torch.equal(lone[0], torch.zeros(RANK, dtype=torch.float64))  # nothing but its own fold


@pytest.mark.parametrize(
    ("positions", "wanted", "expected"),
    [(6, 3, [0, 0, 1, 1, 2, 2]), (3, 4, [0, 1, 2]), (0, 4, []), (5, 2, [0, 0, 0, 1, 1])],
)
def test_folds_are_contiguous_blocks(positions: int, wanted: int, expected: list[int]) -> None:
    assert taste.folds(positions, wanted).tolist() == expected


def test_the_basis_of_every_task_and_what_belongs_to_it() -> None:
    config = TasteConfig(rank=RANK, precision=20.0)
    basis = taste.initial_basis(config, BOTH, HEAD, seed=3)
    again = taste.initial_basis(config, BOTH, HEAD, seed=3)
    other = taste.initial_basis(config, BOTH, HEAD, seed=4)
    for task in BOTH:
        assert basis[taste.text_name(task)].shape == (RANK, 8)
        assert basis[taste.ids_name(task)].shape == (RANK, 4)
        assert float(basis[taste.precision_name(task)]) == pytest.approx(math.log(20.0))
    assert all(torch.equal(basis[name], again[name]) for name in basis)
    assert not torch.equal(basis[taste.text_name(Task.LIKE)], other[taste.text_name(Task.LIKE)])
    text_only = taste.initial_basis(
        config, (Task.NEXT_ITEM,), HEAD.model_copy(update={"item_ids": ItemIds.NONE}), seed=3
    )
    assert taste.ids_name(Task.NEXT_ITEM) not in text_only
    vectors = taste.initial_vectors(config, BOTH)
    assert [len(vectors[taste.vector_name(task)]) for task in BOTH] == [RANK, RANK + 1]
    assert all(not value.any() for value in vectors.values())
    assert all(name.startswith("private.") for name in vectors)
    assert all(name.startswith("basis.") for name in basis)


def test_features_are_the_stated_sum_and_send_no_gradient_to_the_ids() -> None:
    config = TasteConfig(rank=RANK)
    shared = taste.initial_basis(config, BOTH, HEAD, seed=3)
    shared[ITEM_IDS] = (_random(ITEMS, 4).float() * 7 + 2).requires_grad_()
    texts = _random(ITEMS, 8, seed=1).float()
    ids = shared[ITEM_IDS].detach()
    ids = (ids - ids.mean(0)) / ids.std()
    text, by_ids = (
        shared[name(Task.NEXT_ITEM)].requires_grad_() for name in (taste.text_name, taste.ids_name)
    )
    features = taste.item_features(shared, Task.NEXT_ITEM, texts)
    torch.testing.assert_close(features, texts @ text.T + ids @ by_ids.T)
    features.sum().backward()  # type: ignore[no-untyped-call]
    assert shared[ITEM_IDS].grad is None
    assert text.grad is not None
    assert by_ids.grad is not None
    liking = taste.item_features(shared, Task.LIKE, texts)
    assert torch.equal(liking[:, -1], torch.ones(ITEMS))
    assert taste.prior_precisions(shared, Task.LIKE).tolist() == pytest.approx(
        [30.0] * RANK + [1.0]
    )
