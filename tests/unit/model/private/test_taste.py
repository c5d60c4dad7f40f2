"""Taste vectors: the closed form against a dense reference, the past's weights, and the prior."""

import math

import pytest
import torch
import torch.nn.functional as F

from pfm_llm.config.choices import ItemIds, Task
from pfm_llm.config.model import HeadConfig, TasteConfig
from pfm_llm.model.head import ITEM_IDS
from pfm_llm.model.private import fits, make_private_part, taste
from pfm_llm.protocol.parameters import Sizes
from tests.support.tables import Drawn, config_of, drawn

ITEMS, RANK, POSITIONS = 13, 3, 11
BOTH = (Task.NEXT_ITEM, Task.LIKE)
HEAD = HeadConfig(dim=8, id_dim=4)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _targets(seed: int = 5) -> torch.Tensor:
    return torch.randint(ITEMS, (POSITIONS,), generator=torch.Generator().manual_seed(seed))


def _basis(
    config: TasteConfig, head: HeadConfig = HEAD, tasks: tuple[Task, ...] = BOTH, seed: int = 3
) -> Drawn:
    whole = config_of(head, taste=config, tasks=tasks, seed=seed)
    return drawn(taste.basis_parameters(whole, Sizes(0, {}, ITEMS)))


def test_the_next_item_fit_is_one_newton_step_of_the_weighted_penalised_loss() -> None:
    """Gradient and Hessian by automatic differentiation, float64."""
    scores, targets, features = _random(POSITIONS, ITEMS), _targets(), _random(ITEMS, RANK, seed=1)
    precisions = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    weights = torch.linspace(0.1, 1, POSITIONS, dtype=torch.float64)

    def loss(vector: torch.Tensor) -> torch.Tensor:
        own = F.cross_entropy(scores + features @ vector, targets, reduction="none")
        return weights @ own + 0.5 * (precisions * vector.square()).sum()

    zero = torch.zeros(RANK, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    hessian = torch.autograd.functional.hessian(loss, zero)
    fitted = fits.fit_next_item(scores, targets, features, precisions, weights[None])
    torch.testing.assert_close(fitted[0], -torch.linalg.solve(hessian, gradient))


def test_the_fit_of_likes_comes_near_the_minimum() -> None:
    logits, features = _random(POSITIONS) * 0.5, _random(POSITIONS, RANK, seed=2)
    other = _random(POSITIONS, RANK, seed=5)
    liked = (_random(POSITIONS, seed=3) > 0).double()
    precisions = torch.full((RANK,), 4.0, dtype=torch.float64)
    weights = torch.linspace(0.1, 1, POSITIONS, dtype=torch.float64)
    vector = torch.zeros(RANK, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([vector], lr=1.0, max_iter=200, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        odds = logits + features @ vector
        own = F.binary_cross_entropy_with_logits(odds, liked, reduction="none")
        loss = weights @ own + 0.5 * (precisions * vector.square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    both = torch.stack([other, features], 1)
    fitted = fits.fit_likes(logits, liked, both, precisions, weights[None])
    assert fitted.shape == (2, 1, RANK)
    torch.testing.assert_close(fitted[1, 0], vector.detach(), atol=1e-3, rtol=0)


def test_each_row_of_weights_has_a_fit_of_its_own_and_none_is_zero() -> None:
    """Weights of zero equal data that are not there; no data at all give zero."""
    scores, targets, features = _random(POSITIONS, ITEMS), _targets(), _random(ITEMS, RANK, seed=1)
    liked, rated = (_random(POSITIONS, seed=3) > 0).double(), features[targets][:, None]
    precisions = torch.full((RANK,), 2.0, dtype=torch.float64)
    weights = torch.zeros(3, POSITIONS, dtype=torch.float64)
    weights[1, :4], weights[2] = 1.0, 0.5
    fitted = fits.fit_next_item(scores, targets, features, precisions, weights)
    liking = fits.fit_likes(scores[:, 0], liked, rated, precisions, weights)[0]
    assert not fitted[0].any()
    assert not liking[0].any()
    alone = fits.fit_next_item(scores[:4], targets[:4], features, precisions, weights[1:2, :4])
    torch.testing.assert_close(fitted[1], alone[0])
    alone = fits.fit_likes(scores[:4, 0], liked[:4], rated[:4], precisions, weights[1:2, :4])
    torch.testing.assert_close(liking[1], alone[0, 0])
    nothing = fits.fit_next_item(scores[:0], targets[:0], features, precisions, weights[:1, :0])
    assert torch.equal(nothing, torch.zeros(1, RANK, dtype=torch.float64))


def test_little_data_give_a_small_vector() -> None:
    features = _random(ITEMS, RANK, seed=1)
    precisions = torch.full((RANK,), 2.0, dtype=torch.float64)
    scores, targets = torch.zeros(POSITIONS, ITEMS).double(), torch.zeros(POSITIONS).long()
    counts = torch.tensor([1, 4, POSITIONS])
    weights = (torch.arange(POSITIONS) < counts[:, None]).double()
    norms = fits.fit_next_item(scores, targets, features, precisions, weights).norm(dim=1)
    assert 0 < norms[0] < norms[1] < norms[2]


@pytest.mark.parametrize(
    ("positions", "size", "expected"), [(5, 2, [0, 0, 1, 1, 2]), (3, 8, [0, 0, 0]), (0, 4, [])]
)
def test_blocks_are_contiguous(positions: int, size: int, expected: list[int]) -> None:
    assert fits.blocks(positions, size).tolist() == expected


def test_a_block_is_predicted_from_earlier_ones_of_which_the_newest_count_most() -> None:
    shared = {taste.half_life_name(Task.LIKE): torch.tensor([2.0]).log()}
    half_life = taste.half_life(shared, Task.LIKE)
    found = fits.past_weights(fits.blocks(5, 2), half_life)
    half = 0.5**0.5
    expected = [
        [0, 0, 0, 0, 0],
        [half, 1, 0, 0, 0],
        [0.5 * half, 0.5, half, 1, 0],
        [0.25, 0.5 * half, 0.5, half, 1],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    none = fits.past_weights(fits.blocks(0, 2), half_life)
    assert none.shape == (1, 0)


def _vectors(config: TasteConfig, head: HeadConfig) -> dict[str, torch.Tensor]:
    experiment = config_of(head, taste=config, tasks=BOTH, seed=3)
    return make_private_part(experiment, Sizes(16, {}, ITEMS)).initial("anybody")


def test_the_basis_of_every_task_and_what_belongs_to_it() -> None:
    config = TasteConfig(rank=RANK, read_rank=0, like_rank=5)
    basis = _basis(config, seed=3)
    again = _basis(config, seed=3)
    other = _basis(config, seed=4)
    for task, shape in zip(BOTH, ((RANK,), (4, 5)), strict=True):
        assert basis[taste.text_name(task)].shape == (*shape, 8)
        assert basis[taste.ids_name(task)].shape == (*shape, 4)
        assert float(basis[taste.precision_name(task)]) == pytest.approx(math.log(30.0))
        half_life = 100.0 if task is Task.LIKE else 20.0
        assert float(basis[taste.half_life_name(task)]) == pytest.approx(math.log(half_life))
    assert all(torch.equal(basis[name], again[name]) for name in basis)
    assert not torch.equal(basis[taste.text_name(Task.LIKE)], other[taste.text_name(Task.LIKE)])
    no_ids = HEAD.model_copy(update={"item_ids": ItemIds.NONE})
    text_only = _basis(config, no_ids, (Task.NEXT_ITEM,))
    assert taste.ids_name(Task.NEXT_ITEM) not in text_only
    assert basis[taste.LIKE_FEATURES].shape == (ITEMS, 4, 5)
    assert not basis[taste.LIKE_FEATURES].any()
    assert taste.LIKE_FEATURES not in _basis(config, no_ids)
    vectors = _vectors(config, HEAD)
    assert [len(vectors[taste.vector_name(task)]) for task in BOTH] == [RANK, 4 * (5 + 1)]
    assert all(not value.any() for value in vectors.values())
    assert all(name.startswith("private.") for name in vectors)
    assert all(name.startswith("basis.") for name in basis)


def test_what_was_met_is_read_where_items_have_ids_and_no_taste_is_shared() -> None:
    config = TasteConfig(read_rank=6, like_rank=RANK)
    basis = _basis(config, seed=3)
    assert basis[taste.READ_IN].shape == basis[taste.READ_OUT].shape == (ITEMS, 6)
    assert basis[taste.READ_IN].any()
    assert not basis[taste.READ_OUT].any()
    assert basis[taste.READ_PRIOR].exp().tolist() == pytest.approx([5.0] * 4)
    half_lives = basis[taste.half_life_name(Task.NEXT_ITEM)].exp()
    assert half_lives.tolist() == pytest.approx([4.0, 15.0, 60.0, 240.0])
    assert taste.text_name(Task.NEXT_ITEM) not in basis
    assert taste.text_name(Task.LIKE) in basis
    vectors = _vectors(config, HEAD)
    assert [len(vectors[taste.vector_name(task)]) for task in BOTH] == [6, 4 * (RANK + 1)]
    assert all(name.startswith("basis.") for name in basis)
    no_ids = HEAD.model_copy(update={"item_ids": ItemIds.NONE})
    assert taste.READ_IN not in _basis(config, no_ids)
    fitted = _vectors(config, no_ids)
    assert len(fitted[taste.vector_name(Task.NEXT_ITEM)]) == config.rank


def test_reading_is_the_shrunk_mean_of_a_fading_past() -> None:
    """By hand, for every length of the past; the first two features fade sooner than the third."""
    embeddings, items = _random(ITEMS, RANK), _targets()
    half_lives, priors = torch.tensor([2.0, 5.0]).double(), torch.tensor([3.0, 4.0]).double()
    shared = {
        taste.READ_IN: embeddings,
        taste.READ_PRIOR: priors.log(),
        taste.half_life_name(Task.NEXT_ITEM): half_lives.log(),
    }
    found = taste.read_vectors(shared, items)
    assert found.shape == (POSITIONS + 1, RANK)
    for known in range(POSITIONS + 1):
        for feature, (half_life, prior) in enumerate([(2, 3), (2, 3), (5, 4)]):
            weights = [0.5 ** ((known - 1 - place) / half_life) for place in range(known)]
            met = [float(embeddings[item, feature]) for item in items[:known]]
            total = sum(w * x for w, x in zip(weights, met, strict=True))
            expected = total / (prior + sum(weights))
            assert float(found[known, feature]) == pytest.approx(expected, abs=1e-12)
    assert not found[0].any()


def test_features_are_the_stated_sum_and_send_no_gradient_to_the_ids() -> None:
    config = TasteConfig(rank=RANK, read_rank=0, like_rank=RANK)
    shared = _basis(config, seed=3)
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
    shared[taste.LIKE_FEATURES] = _random(ITEMS, 4, RANK, seed=2).float()
    liking = taste.item_features(shared, Task.LIKE, texts)
    assert torch.equal(liking[..., -1], torch.ones(ITEMS, 4))
    text, by_ids = (shared[name(Task.LIKE)] for name in (taste.text_name, taste.ids_name))
    free = shared[taste.LIKE_FEATURES]
    for fit in range(4):
        expected = texts @ text[fit].T + ids @ by_ids[fit].T + free[:, fit]
        torch.testing.assert_close(liking[:, fit, :-1], expected)
    assert taste.prior_precisions(shared, Task.LIKE).tolist() == pytest.approx(
        [30.0] * RANK + [1.0]
    )
