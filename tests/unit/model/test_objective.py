"""The client's loss: its parts, who receives which gradient, and what fitting gives."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pfm_llm.config.choices import Task
from pfm_llm.config.model import AdaptersConfig, HeadConfig, PrivateAdapterConfig, TasteConfig
from pfm_llm.data.history import NO_LABEL
from pfm_llm.model import head as recommender_head
from pfm_llm.model.objective import Objective
from pfm_llm.model.outputs import Outputs, SharedView
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import fits, make_private_part, taste
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.text.encoding import NO_TARGET
from tests.support.tables import config_of, drawn

ITEMS, HIDDEN, POSITIONS, BEFORE = 17, 12, 10, 3
HEAD = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
FITTED = TasteConfig(rank=3, read_rank=0, like_rank=3)
READ = FITTED.model_copy(update={"read_rank": 5})
BOTH = (Task.NEXT_ITEM, Task.LIKE)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _own(config: TasteConfig = FITTED) -> dict[str, torch.Tensor]:
    whole, sizes = config_of(HEAD, taste=config, tasks=BOTH), Sizes(HIDDEN, {}, ITEMS)
    own = drawn(parameter_table(whole, sizes).values())
    stirred = {
        name: value + _random(*value.shape, seed=index) * 0.3
        for index, (name, value) in enumerate(own.items())
    }
    return {name: value.requires_grad_() for name, value in stirred.items()}


def _outputs() -> Outputs:
    generator = torch.Generator().manual_seed(4)
    liked = torch.randint(2, (POSITIONS,), generator=generator)
    liked[3] = NO_LABEL
    met = torch.randint(ITEMS, (BEFORE + POSITIONS,), generator=generator)
    return Outputs(
        vectors=_random(POSITIONS, HEAD.dim, seed=7),
        targets=met[BEFORE:],
        liked=liked,
        met=met,
        known=torch.arange(BEFORE, BEFORE + POSITIONS),
    )


def _first(outputs: Outputs, count: int) -> Outputs:
    """The first so many positions."""
    return dataclasses.replace(
        outputs,
        vectors=outputs.vectors[:count],
        targets=outputs.targets[:count],
        liked=outputs.liked[:count],
        met=outputs.met[: BEFORE + count],
        known=outputs.known[:count],
    )


def _unrated(outputs: Outputs) -> Outputs:
    return dataclasses.replace(outputs, liked=torch.full((POSITIONS,), NO_LABEL))


@pytest.fixture(autouse=True)
def _blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taste, "BLOCK", 4)


def _objective(config: TasteConfig | None = FITTED, tasks: tuple[Task, ...] = BOTH) -> Objective:
    """With the user embedding of a config, or without a private part."""
    private = PrivateAdapterConfig(
        kind="taste", enabled=config is not None, taste=config or TasteConfig()
    )
    experiment = config_of(HEAD, AdaptersConfig(private=private), tasks=tasks)
    part = make_private_part(experiment, Sizes(HIDDEN, {}, ITEMS))
    return Objective(_random(ITEMS, HEAD.dim, seed=9), tasks, part)


def test_without_a_private_part_it_is_the_two_cross_entropies() -> None:
    own, outputs, objective = _own(), _outputs(), _objective(None)
    scores = recommender_head.score_items(own, outputs.vectors, objective.item_texts)
    logits = recommender_head.like_logits(own, objective.item_texts)[outputs.targets]
    known = outputs.liked != NO_LABEL
    like = F.binary_cross_entropy_with_logits(
        logits[known], outputs.liked[known].float(), reduction="sum"
    )
    next_item = F.cross_entropy(scores, outputs.targets)
    torch.testing.assert_close(objective.loss(own, outputs), next_item + like / 64)
    alone = _objective(None, (Task.NEXT_ITEM,))
    torch.testing.assert_close(alone.loss(own, outputs), next_item)


@pytest.mark.parametrize("config", [FITTED, READ, None])
def test_what_was_met_is_no_candidate(config: TasteConfig | None) -> None:
    """All is as if the catalogue held the candidates alone."""
    own, outputs, tasks = _own(config or FITTED), _outputs(), (Task.NEXT_ITEM,)
    gone = torch.tensor([item for item in range(ITEMS) if item not in outputs.met][:3])
    left = torch.tensor([item for item in range(ITEMS) if item not in gone])
    seen = torch.zeros(POSITIONS, ITEMS, dtype=torch.bool)
    seen[:, gone] = True
    # Standardised over the whole catalogue, IDs are other features in a smaller one.
    own = {name: value for name, value in own.items() if name != "basis.taste.next_item.ids"}
    smaller = {
        name: value[left] if value.shape[:1] == (ITEMS,) else value for name, value in own.items()
    }
    whole = _objective(config, tasks)
    masked = dataclasses.replace(outputs, seen=seen)
    renamed = dataclasses.replace(
        outputs,
        targets=torch.searchsorted(left, outputs.targets),
        met=torch.searchsorted(left, outputs.met),
    )
    cut = dataclasses.replace(whole, item_texts=whole.item_texts[left])
    torch.testing.assert_close(whole.loss(own, masked), cut.loss(smaller, renamed))
    assert not torch.allclose(whole.loss(own, masked), whole.loss(own, outputs))
    if config is not None:
        fitted, expected = whole.fit(own, masked), cut.fit(smaller, renamed)
        torch.testing.assert_close(fitted, expected)
        assert all(value.any() for value in fitted.values())


@pytest.mark.parametrize("config", [FITTED, READ])
def test_the_shared_part_learns_what_it_would_learn_without_a_private_one(
    config: TasteConfig,
) -> None:
    own, outputs = _own(config), _outputs()
    names = list(own)
    with_taste, without = (
        torch.autograd.grad(
            _objective(kind).loss(own, outputs),
            [own[name] for name in names],
            allow_unused=True,
            materialize_grads=True,
        )
        for kind in (config, None)
    )
    for name, one, other in zip(names, with_taste, without, strict=True):
        if name.startswith("basis."):
            assert one.any(), name
            assert not other.any(), name
        else:
            torch.testing.assert_close(one, other, msg=name)


def test_each_block_is_predicted_from_the_past_alone() -> None:
    """What comes at or after a block never changes the vector that predicts it."""
    own, outputs = _own(), _outputs()
    objective = _objective(tasks=(Task.NEXT_ITEM,))
    scores = recommender_head.score_items(own, outputs.vectors, objective.item_texts)
    features = taste.item_features(own, Task.NEXT_ITEM, objective.item_texts)
    precisions = taste.prior_precisions(own, Task.NEXT_ITEM)
    losses = []
    for start in range(0, POSITIONS, 4):
        one_block = torch.zeros(start, dtype=torch.long)
        past = fits.past_weights(one_block, taste.half_life(own, Task.NEXT_ITEM))[-1:]
        vector = fits.fit_next_item(
            scores[:start], outputs.targets[:start], features, precisions, past
        )[0]
        mine = slice(start, start + 4)
        personal = scores[mine] + features @ vector
        losses.append(F.cross_entropy(personal, outputs.targets[mine], reduction="sum"))
    expected = F.cross_entropy(scores, outputs.targets) + sum(losses) / POSITIONS
    torch.testing.assert_close(objective.loss(own, outputs), expected)


def test_a_position_is_predicted_with_what_was_read_before_it() -> None:
    own, outputs = _own(READ), _outputs()
    objective = _objective(READ, (Task.NEXT_ITEM,))
    scores = recommender_head.score_items(own, outputs.vectors, objective.item_texts)
    kept = (_random(POSITIONS, 5, seed=3) > 0).float() * 2
    losses = {False: 0.0, True: 0.0}
    for t in range(POSITIONS):
        # What fitting to the first t events gives, that is, an agent that knows no more.
        before = _first(outputs, t)
        vector = objective.fit(own, before)[taste.vector_name(Task.NEXT_ITEM)]
        assert vector.any()
        for drops in losses:
            added = own[taste.READ_OUT] @ (vector * kept[t] if drops else vector)
            losses[drops] += F.cross_entropy(scores[t] + added, outputs.targets[t]).item()
    shared = F.cross_entropy(scores, outputs.targets).item()
    for drops, total in losses.items():
        given = dataclasses.replace(outputs, kept_private=kept) if drops else outputs
        expected = torch.tensor(shared + total / POSITIONS)
        torch.testing.assert_close(objective.loss(own, given), expected)


def test_dropout_reaches_the_shared_part_alone() -> None:
    """The basis is trained on the scores that serving has."""
    own, outputs, objective = _own(), _outputs(), _objective(tasks=(Task.NEXT_ITEM,))
    kept = (_random(POSITIONS, HEAD.dim, seed=3) > 0).float() * 2
    dropped = dataclasses.replace(outputs, kept=kept)
    shared = [
        F.cross_entropy(
            recommender_head.score_items(own, vectors, objective.item_texts), outputs.targets
        )
        for vectors in (outputs.vectors, outputs.vectors * kept)
    ]
    difference = objective.loss(own, dropped) - objective.loss(own, outputs)
    torch.testing.assert_close(difference, shared[1] - shared[0])


@pytest.mark.parametrize("labels", ["all", "none"])
def test_fitting_gives_a_vector_for_each_task(labels: str) -> None:
    own = {name: value.detach() for name, value in _own().items()}
    outputs = _outputs()
    if labels == "none":
        outputs = _unrated(outputs)
    vectors = _objective().fit(own, outputs)
    assert vectors[taste.vector_name(Task.NEXT_ITEM)].shape == (3,)
    assert vectors[taste.vector_name(Task.LIKE)].shape == (4 * 4,)
    assert vectors[taste.vector_name(Task.NEXT_ITEM)].any()
    assert bool(vectors[taste.vector_name(Task.LIKE)].any()) == (labels == "all")


def test_without_any_label_there_is_no_loss_of_likes() -> None:
    own, outputs = _own(), _outputs()
    bare = _unrated(outputs)
    torch.testing.assert_close(
        _objective().loss(own, bare), _objective(tasks=(Task.NEXT_ITEM,)).loss(own, bare)
    )


def test_likes_are_predicted_by_the_mean_of_fits_that_are_learned_apart() -> None:
    """Four bases: the loss is the mean of what each has alone, the served logits the mean too."""
    own, outputs = _own(), _outputs()
    objective = _objective()
    alone = []
    for fit in range(4):
        one = dict(own)
        for name in (taste.text_name(Task.LIKE), taste.ids_name(Task.LIKE)):
            one[name] = own[name][fit : fit + 1]
        one[taste.LIKE_FEATURES] = own[taste.LIKE_FEATURES][:, fit : fit + 1]
        alone.append(one)
    losses = [objective.loss(one, outputs) for one in alone]
    torch.testing.assert_close(objective.loss(own, outputs), sum(losses) / 4)
    assert not torch.allclose(*losses[:2])
    added = [
        taste.item_features(one, Task.LIKE, objective.item_texts).flatten(1)
        @ objective.fit(one, outputs)[taste.vector_name(Task.LIKE)]
        for one in (own, *alone)
    ]
    torch.testing.assert_close(added[0], sum(added[1:]) / 4)


def test_the_kth_item_ahead_counts_one_kth_where_it_is_a_candidate() -> None:
    objective, own, outputs = _objective(None, (Task.NEXT_ITEM,)), _own(), _outputs()
    later = torch.stack([outputs.targets.roll(-1), outputs.targets.roll(-2)], 1)
    later[-1], later[-2, 1] = NO_TARGET, NO_TARGET
    seen = torch.zeros(POSITIONS, ITEMS, dtype=torch.bool)
    seen[0, later[0, 1]] = later[0, 1] != outputs.targets[0]  # met again: no target
    assert seen[0].any()
    outputs = dataclasses.replace(outputs, later=later, seen=seen)
    scores = SharedView(own, outputs, objective.item_texts).scores
    expected = []
    for t in range(POSITIONS):
        ahead = [(1.0, outputs.targets[t]), (1 / 2, later[t, 0]), (1 / 3, later[t, 1])]
        ahead = [(g, y) for g, y in ahead if y != NO_TARGET and not seen[t, y]]
        losses = [g * F.cross_entropy(scores[t], y) for g, y in ahead]
        expected.append(sum(losses) / sum(g for g, _ in ahead))
    loss = objective.loss(own, outputs)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    (gradient,) = torch.autograd.grad(loss, own["head.item_proj"])
    assert gradient.isfinite().all()
    alone = dataclasses.replace(outputs, later=None)
    torch.testing.assert_close(objective.loss(own, alone), F.cross_entropy(scores, outputs.targets))
