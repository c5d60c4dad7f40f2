"""The recommender head: whitening, its parameters, and scores as their formula says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import ItemIds
from pfm_llm.config.model import HeadConfig
from pfm_llm.model.head import (
    context_vectors,
    head_parameters,
    item_inputs,
    met_items,
    met_term,
    score_items,
    user_vectors,
    with_met_rows,
    zero_shot_scores,
)
from pfm_llm.model.items.whitening import Normaliser, fit_normaliser
from pfm_llm.protocol.parameters import Sizes
from tests.support.tables import Drawn, config_of, drawn


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _head(
    config: HeadConfig, hidden_size: int, num_items: int, seed: int = 0, reading: str = "items"
) -> Drawn:
    settings = config_of(config, seed=seed, window={"reading": reading})
    return drawn(head_parameters(settings, Sizes(hidden_size, {}, num_items)))


def test_whitening_gives_the_identity_up_to_shrinkage() -> None:
    """Variance v becomes v / (0.9 v + 0.1 mean v), and no two dimensions are correlated."""
    variances = torch.tensor([8.0, 4.0, 2.0, 1.0])
    states = _random(2000, 4) * variances.sqrt() @ torch.linalg.qr(_random(4, 4)).Q + 3
    white = fit_normaliser(states)(states)
    covariance = torch.cov(white.T)
    found = torch.linalg.eigvalsh(torch.cov(states.T)).flip(0)
    expected = found / (0.9 * found + 0.1 * found.mean())
    torch.testing.assert_close(covariance, expected.diag(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(white.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    assert (expected > 0.7).all()


def test_dimensions_come_by_falling_variance() -> None:
    states = _random(500, 3) * torch.tensor([1.0, 5.0, 2.0])
    basis = fit_normaliser(states).basis
    assert basis.abs().argmax(0).tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_the_sign_of_each_direction_is_fixed(seed: int) -> None:
    """The largest entry of each is positive; mirrored states give the same basis."""
    states = _random(50, 6, seed=seed)
    basis = fit_normaliser(states).basis
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(fit_normaliser(-states).basis, basis)


def test_equal_texts_become_zeros_and_not_infinities() -> None:
    states = torch.full((7, 5), 0.1)
    normaliser = fit_normaliser(states)
    assert torch.equal(normaliser(states), torch.zeros(7, 5))
    assert normaliser.basis.isfinite().all()


def test_fewer_texts_than_dimensions_stay_bounded() -> None:
    """Directions without variance are scaled by 1/sqrt(a tenth of the mean variance) at most."""
    states = _random(3, 20)
    normaliser = fit_normaliser(states)
    mean_variance = torch.cov(states.T).diag().mean()
    bound = (0.1 * mean_variance) ** -0.5
    assert float(normaliser.basis.norm(dim=0).max()) <= float(bound) * 1.001
    one = fit_normaliser(states[:1])
    assert torch.equal(one(states[:1]), torch.zeros(1, 20))


def test_a_normaliser_moves_and_reads_any_dtype() -> None:
    normaliser = Normaliser(torch.zeros(2), torch.eye(2)).to(torch.device("cpu"))
    assert normaliser(torch.ones(3, 2, dtype=torch.bfloat16)).dtype is torch.float32


@pytest.mark.parametrize(
    ("item_ids", "bias", "expected"),
    [
        (ItemIds.NONE, False, {}),
        (ItemIds.NONE, True, {"item_bias": (9,)}),
        (ItemIds.OUTPUT, False, {"item_ids": (9, 4), "item_ids_out": (6, 4)}),
        (
            ItemIds.BOTH,
            True,
            {"item_bias": (9,), "item_ids": (9, 4), "item_ids_out": (6, 4), "item_ids_in": (16, 4)},
        ),
    ],
)
def test_parameters_and_shapes(
    item_ids: ItemIds, bias: bool, expected: dict[str, tuple[int, ...]]
) -> None:
    config = HeadConfig(dim=6, id_dim=4, item_ids=item_ids, item_bias=bias)
    head = _head(config, 16, 9)
    shapes = {name.removeprefix("head."): tuple(tensor.shape) for name, tensor in head.items()}
    width = 6 if item_ids is ItemIds.NONE else 10
    always = {"state_proj": (6, 16), "state_log_n": (1,), "item_proj": (6, 6), "item_met": (9,)}
    context = {"context_proj": (6, 2 * width), "context_log_h": (2,), "context_log_n": (2,)}
    assert shapes == {**always, **context, **expected}
    without = _head(config.model_copy(update={"item_context": False}), 16, 9)
    assert without.keys() == head.keys() - {f"head.{name}" for name in context}
    assert all(tensor.dtype is torch.float32 for tensor in head.values())
    again, other = _head(config, 16, 9), _head(config, 16, 9, seed=1)
    assert all(torch.equal(head[name], again[name]) for name in head)
    if item_ids is not ItemIds.NONE:
        assert not torch.equal(head["head.item_ids"], other["head.item_ids"])


def test_more_dimensions_than_the_backbone_has_are_refused() -> None:
    assert _head(HeadConfig(dim=16), 16, 2)
    with pytest.raises(ConfigError, match=r"head\.dim: 17 exceeds .* 16; lower it"):
        _head(HeadConfig(dim=17), 16, 2)


def test_training_starts_from_the_similarity_of_whitened_states_or_without_a_pass() -> None:
    config = HeadConfig(dim=3, id_dim=2)
    head = _head(config, hidden_size=5, num_items=4)
    states, texts = _random(2, 5), _random(4, 3)
    assert not score_items(head, user_vectors(head, states, torch.tensor([3, 3])), texts).any()
    head = _head(config, hidden_size=5, num_items=4, reading="tokens")
    scores = score_items(head, user_vectors(head, states, torch.tensor([3, 3])), texts)
    torch.testing.assert_close(scores, 3 / 8 * 0.5 / 3**0.5 * states[:, :3] @ texts.T)
    inputs = item_inputs(head, torch.tensor([0, 3]))
    assert inputs is not None
    assert not inputs.any()


@given(
    num_users=st.integers(0, 3),
    num_items=st.integers(1, 5),
    private=st.booleans(),
    item_ids=st.sampled_from(list(ItemIds)),
    bias=st.booleans(),
)
def test_scores_equal_their_formula(
    num_users: int, num_items: int, private: bool, item_ids: ItemIds, bias: bool
) -> None:
    """score_i = scale (u . P z_i + u . O e_i) + bias_i with u = (W n + B A n) r / (r + n_s)."""
    config = HeadConfig(dim=3, id_dim=2, item_ids=item_ids, item_bias=bias)
    head = {
        name: _random(*tensor.shape, seed=seed)
        for seed, (name, tensor) in enumerate(_head(config, 4, num_items).items())
    }
    states, texts = _random(num_users, 4, seed=8), _random(num_items, 3, seed=9)
    a, b = _random(2, 4, seed=10), _random(3, 2, seed=11)
    read = torch.arange(num_users)
    found = score_items(head, user_vectors(head, states, read, (a, b) if private else None), texts)
    assert found.shape == (num_users, num_items)
    for r, (row, n) in enumerate(zip(found, states, strict=True)):
        u = head["head.state_proj"] @ n + (b @ (a @ n) if private else 0)
        u = u * r / (r + head["head.state_log_n"].exp())
        for i in range(num_items):
            text = head["head.item_proj"] @ texts[i]
            own = (
                head["head.item_ids_out"] @ head["head.item_ids"][i]
                if "head.item_ids" in head
                else 0
            )
            expected = 0.5 / 3**0.5 * (u @ (text + own)) + (
                head["head.item_bias"][i] if bias else 0
            )
            torch.testing.assert_close(row[i], expected, atol=1e-4, rtol=1e-4)


def test_item_inputs_are_projected_rows_and_absent_without_the_input_path() -> None:
    head = {"head.item_ids": _random(5, 2), "head.item_ids_in": _random(4, 2, seed=1)}
    inputs = item_inputs(head, torch.tensor([3, 3, 0]))
    assert inputs is not None
    for row, item in zip(inputs, (3, 3, 0), strict=True):
        torch.testing.assert_close(row, head["head.item_ids_in"] @ head["head.item_ids"][item])
    assert item_inputs({"head.item_ids": _random(5, 2)}, torch.tensor([1])) is None


def test_zero_shot_scores_are_cosines() -> None:
    scores = zero_shot_scores(torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[1.0, 0], [-6, -8]]))
    torch.testing.assert_close(scores, torch.tensor([[0.6, -1.0]]))


def test_the_context_is_a_mean_of_the_items_so_far_in_which_the_newest_counts_most() -> None:
    texts, ids = _random(5, 3), _random(5, 2, seed=1)
    head = {
        "head.item_ids": ids,
        "head.context_proj": _random(3, 2 * 5, seed=2),
        "head.context_log_h": torch.tensor([1.0, 2.0]).log(),
        "head.context_log_n": torch.tensor([2.0, 6.0]).log(),
    }
    items = torch.tensor([[4, 1, 2], [3, 0, 0]])  # the second is one item long, and padded
    found = context_vectors(head, items, texts)
    assert found is not None
    read = torch.cat([texts, ids], 1)
    fast = (read[4] / 4 + read[1] / 2 + read[2]) / 1.75
    half = 0.5**0.5
    slow = (read[4] / 2 + read[1] * half + read[2]) / (1.5 + half)
    # Three items count 3 / (3 + 2) and 3 / (3 + 6), one item 1 / (1 + 2) and 1 / (1 + 6).
    expected = head["head.context_proj"] @ torch.cat([fast * 3 / 5, slow / 3])
    torch.testing.assert_close(found[0, 2], expected)
    alone = head["head.context_proj"] @ torch.cat([read[3] / 3, read[3] / 7])
    torch.testing.assert_close(found[1, 0], alone)
    assert context_vectors({"head.item_ids": ids}, items, texts) is None


def test_an_item_that_nobody_has_met_has_no_embedding() -> None:
    own = {"head.item_ids": torch.ones(3, 2), "head.item_met": torch.tensor([0.0, 1e-9, -1.0])}
    assert with_met_rows(own)["head.item_ids"].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert met_items(own) is not None
    del own["head.item_met"]
    assert torch.equal(with_met_rows(own)["head.item_ids"], own["head.item_ids"])
    assert met_items(own) is None


def test_the_term_of_met_items_is_no_loss_and_raises_their_entries() -> None:
    met = torch.tensor([0.0, 2.0, 0.0, 0.0], requires_grad=True)
    term = met_term({"head.item_met": met}, torch.tensor([1, 3]))
    assert float(term) == 0
    (gradient,) = torch.autograd.grad(term, met)
    assert gradient.tolist() == pytest.approx([0, -1e-3, 0, -1e-3])


def test_a_whitening_is_rescaled_to_texts_that_it_was_not_fitted_to() -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(3, 0.1, 12)
    fitted, others = (torch.randn(n, 12, generator=generator) * spread for n in (30, 5000))
    normaliser = fit_normaliser(fitted)
    white, raw = normaliser.rescaled(others)(others), normaliser(others)
    ours = normaliser(fitted).var(0)
    assert (raw.var(0)[-3:] > 1.3 * ours[-3:]).all()
    torch.testing.assert_close(white.var(0), ours, rtol=0.1, atol=0.01)
    # The axes stay, and the texts of the fit, or a single other one, change nothing much.
    assert torch.allclose(torch.nn.functional.cosine_similarity(white, raw, dim=0), torch.ones(12))
    torch.testing.assert_close(
        normaliser.rescaled(fitted)(fitted), normaliser(fitted), rtol=0.02, atol=0.02
    )
    alone = normaliser.rescaled(others[:1])(others)
    torch.testing.assert_close(alone, raw, rtol=0.02, atol=0.02)


def test_rescaling_a_catalogue_without_variance_stays_finite() -> None:
    flat = fit_normaliser(torch.ones(4, 3))
    assert torch.isfinite(flat.rescaled(torch.randn(5, 3))(torch.randn(5, 3))).all()
    few = fit_normaliser(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(few.rescaled(torch.randn(5, 6)).basis).all()
