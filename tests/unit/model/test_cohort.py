"""The many-clients pass equals PEFT one client at a time, and keeps clients apart."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from pfm_llm.config.choices import Ablation, ItemIds
from pfm_llm.config.model import HeadConfig
from pfm_llm.model.ablation import Sight
from pfm_llm.model.batches import ChunkBatch, Dropout, collate
from pfm_llm.model.cohort import CohortModel, Parts
from pfm_llm.model.layers import CohortLinear
from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import Window
from tests.support.peft_reference import PeftReference
from tests.support.tiny_models import (
    ARCHITECTURES,
    CLIENT_WINDOWS,
    HIDDEN,
    NUM_ITEMS,
    TinyCohort,
    make_cohort,
    random_window,
    stack,
    stirred,
)

TOLERANCE = 1e-5
EVERYTHING = Parts()
PLAIN = HeadConfig(dim=8, item_bias=False, item_ids=ItemIds.NONE)
FULL = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    found, expected = found.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= TOLERANCE * scale, what


def _batch(
    cohort: TinyCohort,
    windows: Sequence[Sequence[Window]] = CLIENT_WINDOWS,
    last_only: bool = False,
) -> ChunkBatch:
    states = [[cohort.trunk_states(window) for window in own] for own in windows]
    return collate(windows, states, last_only)


def _stacked_losses(
    cohort: TinyCohort,
    stacked: Tensors,
    chosen: tuple[int, ...] = (0, 1, 2),
    parts: Parts = EVERYTHING,
) -> list[torch.Tensor]:
    batch = _batch(cohort, [CLIENT_WINDOWS[client] for client in chosen])
    return cohort.model.losses(batch, stacked, parts)


def _gradients(losses: list[torch.Tensor], stacked: Tensors) -> Mapping[str, torch.Tensor]:
    total = torch.stack(losses).sum()
    found = torch.autograd.grad(
        total, list(stacked.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(stacked, found, strict=True))


@pytest.mark.parametrize(
    ("architecture", "head"), [("llama", PLAIN), *((name, FULL) for name in ARCHITECTURES)]
)
def test_stacked_pass_equals_peft_one_client_at_a_time(architecture: str, head: HeadConfig) -> None:
    """Loss, scores, and every gradient of three clients with unequal windows and adapters."""
    cohort = make_cohort(architecture, head)
    clients = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    stacked = stack(clients)
    losses = _stacked_losses(cohort, stacked)
    gradients = _gradients(losses, stacked)
    for client, tensors in enumerate(clients):
        reference = PeftReference(cohort, tensors)
        windows = CLIENT_WINDOWS[client]
        loss, expected = reference.loss_and_gradients(windows)
        _assert_close(losses[client], loss, "loss")
        assert expected.keys() == stacked.keys()
        for name, gradient in expected.items():
            assert float(gradient.abs().max()) > 1e-6, f"{name} is not tested"
            _assert_close(gradients[name][client], gradient, name)
        batch = _batch(cohort, [windows], last_only=True)
        scores = cohort.model.scores(batch, stack([tensors]), Parts())
        last = [reference.scores(window)[-1].detach() for window in windows]
        _assert_close(scores, torch.stack(last), "scores")


def test_stacked_pass_equals_peft_with_a_folded_shared_basis() -> None:
    """With a shared basis the gradient of the private A in PEFT is the basis's."""
    cohort = make_cohort(private={"rank": 2, "alpha": 5, "head_rank": 2, "kind": "shared_basis"})
    clients = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    assert not any(name.startswith("private.") and name.endswith(".A") for name in clients[0])
    stacked = stack(clients)
    losses = _stacked_losses(cohort, stacked)
    gradients = _gradients(losses, stacked)
    for client, tensors in enumerate(clients):
        loss, expected = PeftReference(cohort, tensors).loss_and_gradients(CLIENT_WINDOWS[client])
        _assert_close(losses[client], loss, "loss")
        for name, gradient in expected.items():
            own = name.startswith("private.lora.") and name.endswith(".A")
            name = f"basis.{name.removeprefix('private.lora.')}" if own else name
            _assert_close(gradients[name][client], gradient, name)


@pytest.mark.parametrize("zero", [True, False])
def test_a_shared_basis_learns_only_through_private_parts_that_are_not_zero(zero: bool) -> None:
    cohort = make_cohort(private={"rank": 2, "alpha": 5, "head_rank": 2, "kind": "shared_basis"})
    tensors = cohort.client_tensors(1)
    if zero:
        tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.startswith("private.")}
    stacked = stack([tensors])
    gradients = _gradients(_stacked_losses(cohort, stacked, (1,)), stacked)
    bases = {name: g for name, g in gradients.items() if name.startswith("basis.")}
    assert len(bases) == len(cohort.adapter.modules) + 1
    assert all(bool(g.any()) is not zero for g in bases.values())
    private = [g for name, g in gradients.items() if name.startswith("private.")]
    assert all(bool(g.any()) for g in private)


def _scores(cohort: TinyCohort, tensors: Tensors, parts: Parts = EVERYTHING) -> torch.Tensor:
    batch = _batch(cohort, CLIENT_WINDOWS[1:2], last_only=True)
    return cohort.model.scores(batch, stack([tensors]), parts)


def test_zero_private_adapter_equals_shared_only() -> None:
    cohort = make_cohort()
    tensors = cohort.client_tensors(1)
    zero = {
        name: torch.zeros_like(value) if name.startswith("private.") and name[-1] == "B" else value
        for name, value in tensors.items()
    }
    without = {name: value for name, value in tensors.items() if not name.startswith("private.")}
    shared_only = _scores(cohort, tensors, Parts(private_weight=0.0))
    _assert_close(_scores(cohort, zero), shared_only, "zero private adapter")
    assert torch.equal(_scores(cohort, without), shared_only)
    assert float((_scores(cohort, tensors) - shared_only).abs().max()) > 1e-2


def test_private_weight_scales_the_private_parts_alone() -> None:
    """Weight w with factors B equals weight 1 with factors w B."""
    cohort = make_cohort()
    tensors = cohort.client_tensors(1)
    halved = {
        name: value * 0.5 if name.startswith("private.") and name[-1] == "B" else value
        for name, value in tensors.items()
    }
    _assert_close(
        _scores(cohort, tensors, Parts(private_weight=0.5)), _scores(cohort, halved), "weight"
    )


def test_private_only_leaves_the_shared_lora_out() -> None:
    cohort = make_cohort()
    tensors = cohort.client_tensors(1)
    without = {
        name: torch.zeros_like(value) if name.startswith("lora.") and name[-1] == "B" else value
        for name, value in tensors.items()
    }
    private_only = _scores(cohort, tensors, Parts(shared_lora=False))
    _assert_close(private_only, _scores(cohort, without), "private only")
    assert float((private_only - _scores(cohort, tensors)).abs().max()) > 1e-2


@pytest.mark.parametrize("unseen_only", [False, True])
def test_a_clients_loss_and_gradient_do_not_depend_on_who_else_is_in_the_chunk(
    unseen_only: bool,
) -> None:
    cohort = make_cohort(unseen_only=unseen_only)
    clients = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    together = stack(clients)
    losses = _stacked_losses(cohort, together)
    gradients = _gradients(losses, together)
    for client in range(3):
        alone = stack([clients[client]])
        loss = _stacked_losses(cohort, alone, (client,))
        _assert_close(losses[client], loss[0], "loss")
        for name, gradient in _gradients(loss, alone).items():
            _assert_close(gradients[name][client], gradient[0], name)


def test_a_loss_over_what_is_unseen_is_lower() -> None:
    """Of two softmaxes with the same scores the one with fewer rivals."""
    over_all, unseen = (make_cohort(unseen_only=unseen_only) for unseen_only in (False, True))
    stacked = stack([over_all.client_tensors(seed) for seed in (1, 2, 3)])
    pairs = zip(_stacked_losses(over_all, stacked), _stacked_losses(unseen, stacked), strict=True)
    assert all(bool(lower < higher) for higher, lower in pairs)


def test_a_loss_depends_on_its_own_clients_tensors_alone() -> None:
    """The gradient of client 1's loss with respect to the others' slices is exactly zero."""
    cohort = make_cohort()
    stacked = stack([cohort.client_tensors(seed) for seed in (1, 2, 3)])
    gradients = _gradients([_stacked_losses(cohort, stacked)[1]], stacked)
    for name, gradient in gradients.items():
        assert not gradient[[0, 2]].any(), name
        assert gradient[1].any(), name


def test_a_client_whose_tensors_are_not_numbers_does_not_spoil_the_others() -> None:
    cohort = make_cohort()
    clients = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    poison = {n: v * torch.nan if n.startswith("private.") else v for n, v in clients[1].items()}
    good, bad = stack(clients), stack([clients[0], poison, clients[2]])
    good_losses, bad_losses = _stacked_losses(cohort, good), _stacked_losses(cohort, bad)
    expected, found = _gradients(good_losses, good), _gradients(bad_losses, bad)
    assert bad_losses[1].isnan()
    for client in (0, 2):
        assert torch.equal(bad_losses[client], good_losses[client])
        assert all(torch.equal(found[n][client], expected[n][client]) for n in expected)


def test_zero_shot_is_the_cosine_of_whitened_states_without_any_adapter() -> None:
    """Also right after a pass that had adapters."""
    cohort = make_cohort()
    _scores(cohort, cohort.client_tensors(1))
    found = cohort.model.zero_shot_scores(_batch(cohort, CLIENT_WINDOWS[1:2], last_only=True))
    for row, window in zip(found, CLIENT_WINDOWS[1], strict=True):
        tokens = torch.from_numpy(window.tokens).long()[None]
        with torch.no_grad():
            hidden = cohort.backbone.decoder(input_ids=tokens).last_hidden_state[0, -1]
        state = ((hidden - cohort.normaliser.mean) @ cohort.normaliser.basis)[: cohort.head.dim]
        for item, text in enumerate(cohort.item_texts):
            expected = state @ text / (state.norm() * text.norm())
            assert float(row[item]) == pytest.approx(float(expected), abs=1e-5)


def test_collate_to_train_reads_every_target_and_to_rank_every_last_item() -> None:
    """Clients of 1, 3 and 2 windows: 3+2+5+2+4+2 = 18 positions, one per window untargeted."""
    states = [[torch.zeros(len(w.tokens), 5) for w in own] for own in CLIENT_WINDOWS]
    train = collate(CLIENT_WINDOWS, states)
    assert train.num_clients == 3
    assert train.positions_per_client == (3, 9, 6)
    assert train.outputs_per_client == (2, 6, 4)
    assert train.row_clients.tolist() == [0, 1, 1, 1, 2, 2]
    assert train.trunk.shape == (6, 14, 5)  # the longest window has 2 + 5 + 1 + 2 + 3 + 1 tokens
    assert train.row_lengths.tolist() == [len(w.tokens) for own in CLIENT_WINDOWS for w in own]
    assert (train.targets >= 0).all()
    rank = collate(CLIENT_WINDOWS, states, last_only=True)
    assert rank.outputs_per_client == (1, 3, 2)
    last = [int(w.item_ends[-1]) for own in CLIENT_WINDOWS for w in own]
    assert rank.ends[rank.outputs].tolist() == last


def test_a_client_without_windows_takes_its_place_in_a_batch() -> None:
    window = random_window([2, 2], 1)
    batch = collate([(), (window,)], [[], [torch.zeros(6, 5)]])
    assert batch.outputs_per_client == (0, 1)
    assert batch.row_clients.tolist() == [1]


def test_bfloat16_adds_the_low_rank_term_in_its_own_type() -> None:
    cohort = make_cohort(dtype=torch.bfloat16)
    tensors = cohort.client_tensors(1)
    scores = _scores(cohort, tensors)
    assert scores.dtype is torch.float32
    exact = _scores(make_cohort(), tensors)
    assert float((scores - exact).abs().mean()) < 0.1 * float(exact.std())


def _dropout(
    shared: float, private: float, head: float = 0.0, taste: float = 0.0, clients: int = 3
) -> Dropout:
    generators = [torch.Generator().manual_seed(client) for client in range(clients)]
    return Dropout(head, taste, shared, private, generators)


def test_dropout_keeps_the_expectation() -> None:
    """Kept entries are divided by 1 - rate; about a share of ``rate`` is zero."""
    factors = _dropout(0, 0).keep((200, 200), 0.25, client=1)
    assert factors.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((factors == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("dropout", "parts", "changes"),
    [
        (_dropout(0.5, 0.0), Parts(), True),
        (_dropout(0.0, 0.5), Parts(), True),
        (_dropout(0.0, 0.0, head=0.5), Parts(), True),
        (_dropout(0.0, 0.5), Parts(private_weight=0.0), False),
        (_dropout(0.5, 0.0), Parts(shared_lora=False), False),
        (_dropout(0.0, 0.0), Parts(), False),
    ],
)
def test_dropout_reaches_exactly_the_adapter_that_has_a_rate(
    dropout: Dropout, parts: Parts, changes: bool
) -> None:
    cohort = make_cohort()
    stacked = stack([cohort.client_tensors(seed) for seed in (1, 2, 3)])
    batch = _batch(cohort)
    with torch.no_grad():
        plain = torch.stack(cohort.model.losses(batch, stacked, parts))
        dropped = torch.stack(cohort.model.losses(batch, stacked, parts, dropout))
        again = torch.stack(cohort.model.losses(batch, stacked, parts))
    assert bool((plain - dropped).abs().max() > 1e-4) is changes
    assert torch.equal(again, plain)


def test_what_a_client_drops_does_not_depend_on_the_chunk() -> None:
    cohort = make_cohort()
    clients = [cohort.client_tensors(seed) for seed in (1, 2, 3)]
    own = Dropout(0.2, 0.0, 0.3, 0.4, [torch.Generator().manual_seed(2)])
    with torch.no_grad():
        together = cohort.model.losses(
            _batch(cohort), stack(clients), Parts(), _dropout(0.3, 0.4, 0.2)
        )
        batch = _batch(cohort, CLIENT_WINDOWS[2:])
        alone = cohort.model.losses(batch, stack(clients[2:]), Parts(), own)
    _assert_close(together[2], alone[0], "loss")


def test_dropped_entries_do_not_reach_the_low_rank_product() -> None:
    """All but dropped: with a rate near one the linear layer is its frozen base."""
    cohort = make_cohort()
    tensors = cohort.client_tensors(1)
    batch = _batch(cohort, [[random_window([1, 1], 8, header=1)]])
    frozen = {n: torch.zeros_like(t) if n.startswith("lora.") else t for n, t in tensors.items()}
    parts = Parts(private_weight=0.0)
    with torch.no_grad():
        dropped = cohort.model.losses(
            batch, stack([tensors]), parts, _dropout(0.99999, 0.0, clients=1)
        )
        expected = cohort.model.losses(batch, stack([frozen]), parts)
    _assert_close(dropped[0], expected[0], "loss")


def test_cohort_linear_without_factors_is_its_base() -> None:
    base = torch.nn.Linear(4, 3)
    x = torch.randn(2, 5, 4)
    assert torch.equal(CohortLinear(base)(x), base(x))


def test_num_items_is_the_size_of_the_catalogue() -> None:
    model = make_cohort().model
    assert model.num_items == NUM_ITEMS
    model.objective = dataclasses.replace(model.objective, item_texts=model.item_texts[:3])
    assert model.num_items == 3


def test_stirring_is_what_makes_these_tests_bite() -> None:
    zeros = {"x": torch.zeros(3)}
    assert stirred(zeros, 1)["x"].ne(0).all()


def test_an_item_that_nobody_has_met_is_no_negative() -> None:
    """Its embedding and bias then have no gradient, and the loss is that without it."""
    cohort = make_cohort(head=FULL)
    tensors = cohort.client_tensors(1)
    own = {int(item) for window in CLIENT_WINDOWS[1] for item in window.met}
    unmet = next(item for item in range(NUM_ITEMS) if item not in own)
    met = torch.ones(NUM_ITEMS)
    met[unmet] = 0
    stacked = stack([{**tensors, "head.item_met": met}])
    losses = _stacked_losses(cohort, stacked, (1,))
    gradients = _gradients(losses, stacked)
    assert not gradients["head.item_bias"][0, unmet]
    assert not gradients["head.item_ids"][0, unmet].any()
    far = {**tensors, "head.item_bias": tensors["head.item_bias"].clone()}
    far["head.item_bias"][unmet] = -1e4
    (expected,) = _stacked_losses(cohort, stack([far]), (1,))
    assert torch.allclose(losses[0], expected)


def test_what_a_client_has_met_is_a_candidate_before_anybody_has_met_anything() -> None:
    cohort = make_cohort(head=FULL)
    tensors = {**cohort.client_tensors(1), "head.item_met": torch.zeros(NUM_ITEMS)}
    stacked = stack([tensors])
    losses = _stacked_losses(cohort, stacked, (1,))
    assert bool(losses[0].isfinite())
    moved = _gradients(losses, stacked)["head.item_met"][0] != 0
    own = {int(item) for window in CLIENT_WINDOWS[1] for item in window.met}
    assert set(moved.nonzero()[:, 0].tolist()) == own


def test_without_a_pass_user_states_are_zero() -> None:
    cohort = make_cohort(head=FULL)
    tensors = cohort.client_tensors(1)
    without = {**tensors, "head.state_proj": torch.zeros_like(tensors["head.state_proj"])}
    without |= {name: torch.zeros_like(v) for name, v in tensors.items() if "private.head" in name}
    batch = _batch(cohort, CLIENT_WINDOWS[1:2], last_only=True)
    expected = cohort.model.scores(batch, stack([without]), EVERYTHING)
    empty = [[torch.empty(len(window.tokens), 0) for window in CLIENT_WINDOWS[1]]]
    no_pass = CohortModel(
        cohort.backbone.split(2)[1],
        cohort.adapter.top_paths(),
        cohort.adapter.scale(),
        cohort.normaliser,
        cohort.model.objective,
        Sight(Ablation.NO_PASS),
    )
    found = no_pass.scores(
        collate(CLIENT_WINDOWS[1:2], empty, last_only=True), stack([tensors]), EVERYTHING
    )
    _assert_close(found, expected, "scores without a pass")


def _seen(what: Ablation, header: int, num_layers: int = 2) -> tuple[TinyCohort, CohortModel]:
    cohort = make_cohort(head=PLAIN.model_copy(update={"item_context": False}))
    model = CohortModel(
        cohort.backbone.split(num_layers)[1],
        cohort.adapter.top_paths() if num_layers == 2 else {},
        cohort.adapter.scale(),
        cohort.normaliser,
        cohort.model.objective,
        Sight(what, header),
    )
    return cohort, model


def _states_of(model: CohortModel, window: Window, states: torch.Tensor) -> torch.Tensor:
    """Whitened states [L, d] at every item but the last of a window."""
    batch = collate([[window]], [[states]])
    return model._output_states(batch.trunk, batch)


def test_a_prompt_of_one_item_is_a_window_of_that_item() -> None:
    _, model = _seen(Ablation.ONE_ITEM, header=3)
    window = random_window([2, 1, 3, 1, 2], seed=2, header=3)
    states = torch.randn(len(window.tokens), HIDDEN, generator=torch.Generator().manual_seed(1))
    found = _states_of(model, window, states)
    starts = [3, *(window.item_ends[:-1] + 1)]
    for j, (start, end) in enumerate(zip(starts[:4], window.item_ends[:4], strict=True)):
        alone = torch.cat([states[:3], states[start : end + 1]])
        short = dataclasses.replace(
            window,
            tokens=window.tokens[: len(alone)],
            item_ends=np.array([len(alone) - 1], np.int32),
            start=j,
        )
        _assert_close(found[j], _states_of(model, short, alone)[0], f"item {j}")


def test_without_positions_one_layer_reads_a_set() -> None:
    """Two items of equal length change places before the last one; more layers see a little."""
    cohort, model = _seen(Ablation.NO_POSITIONS, header=2, num_layers=1)
    _, ordered = _seen(Ablation.NONE, header=2, num_layers=1)
    window = random_window([2, 2, 2, 2], seed=3)
    states = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1))
    swapped = torch.cat([states[:2], states[4:6], states[2:4], states[6:]])
    before, after = (_states_of(model, window, one)[2] for one in (states, swapped))
    _assert_close(after, before, "a set")
    before, after = (_states_of(ordered, window, one)[2] for one in (states, swapped))
    assert float((before - after).detach().abs().max()) > 1e-3
    assert cohort.head.item_context is False
