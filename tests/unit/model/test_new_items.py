"""The bias of items that nobody has met: its place, what trains it, and what it leaves alone."""

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from pfm_llm.config.choices import ItemIds, Task
from pfm_llm.config.model import HeadConfig, TasteConfig
from pfm_llm.model import head as recommender_head
from pfm_llm.model.new_items import NEW_BIAS, NEW_TEXT, scores_with_hidden, with_new_biases
from pfm_llm.model.objective import Objective
from pfm_llm.model.outputs import Outputs, SharedView
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private import make_private_part
from pfm_llm.protocol.parameters import Sizes
from tests.support.tables import config_of, drawn

ITEMS, HIDDEN, POSITIONS = 17, 12, 9
HEAD = HeadConfig(dim=8, id_dim=4, item_dropout=0.2)
SIZES = Sizes(HIDDEN, {}, ITEMS)
HIDDEN_ITEMS = torch.tensor([1, 4, 11])


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _own(head: HeadConfig = HEAD) -> dict[str, torch.Tensor]:
    own = drawn(parameter_table(config_of(head, taste=TasteConfig(read_rank=4)), SIZES).values())
    return {
        name: (value + _random(*value.shape, seed=index) * 0.3).requires_grad_()
        for index, (name, value) in enumerate(own.items())
    }


def _view(own: dict[str, torch.Tensor], seen: torch.Tensor | None = None) -> SharedView:
    outputs = Outputs(
        vectors=_random(POSITIONS, HEAD.dim, seed=3).requires_grad_(),
        targets=torch.arange(POSITIONS),
        liked=torch.zeros(POSITIONS, dtype=torch.int64),
        met=torch.arange(POSITIONS),
        known=torch.arange(POSITIONS),
        seen=seen,
        hidden=HIDDEN_ITEMS,
    )
    return SharedView(own, outputs, _random(ITEMS, HEAD.dim, seed=5))


def test_a_hidden_item_is_scored_by_its_text_and_the_new_bias() -> None:
    own, seen = _own(), torch.zeros(POSITIONS, ITEMS, dtype=torch.bool)
    seen[6, 4] = True
    view = _view(own, seen)
    found = scores_with_hidden(view, HIDDEN_ITEMS)
    text = view.texts[11]
    path = view.outputs.vectors @ own["head.item_proj"] @ text * (0.5 / math.sqrt(HEAD.dim))
    bias = own[NEW_TEXT] @ text / math.sqrt(HEAD.dim) + own[NEW_BIAS]
    torch.testing.assert_close(found[:, 11], path + bias)
    assert found[6, 4] == -torch.inf
    others = [item for item in range(ITEMS) if item not in HIDDEN_ITEMS]
    assert torch.equal(found[:, others], view.fixed_scores[:, others])


def test_hiding_trains_the_bias_of_new_items_and_nothing_else() -> None:
    own = _own()
    config = config_of(HEAD, taste=TasteConfig(read_rank=4))
    objective = Objective(
        _random(ITEMS, HEAD.dim, seed=5), (Task.NEXT_ITEM,), make_private_part(config, SIZES)
    )
    outputs = _view(own).outputs

    def gradients(outputs: Outputs) -> dict[str, torch.Tensor]:
        names = [*own, "vectors"]
        leaves = [*own.values(), outputs.vectors]
        loss = objective.loss(own, outputs)
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    without = gradients(dataclasses.replace(outputs, hidden=None))
    with_hidden = gradients(outputs)
    changed = {n for n, value in with_hidden.items() if not torch.equal(value, without[n])}
    assert changed == {NEW_BIAS, NEW_TEXT}
    # Targets 1 and 4 are hidden, so the gradient wants both signs: it is no constant push.
    assert float(with_hidden[NEW_BIAS]) != 0


def test_items_that_nobody_has_met_have_the_new_bias_in_serving() -> None:
    own, texts = _own(), _random(ITEMS, HEAD.dim, seed=5)
    own["head.item_met"] = torch.zeros(ITEMS)
    own["head.item_met"][3] = 1.0
    served = with_new_biases(own, texts)[recommender_head.ITEM_BIAS]
    assert served[3] == own["head.item_bias"][3]
    expected = texts[5] @ own[NEW_TEXT] / math.sqrt(HEAD.dim) + own[NEW_BIAS]
    torch.testing.assert_close(served[5:6], expected)


def test_without_item_dropout_nothing_is_there() -> None:
    off = HEAD.model_copy(update={"item_dropout": 0.0})
    own = _own(off)
    assert not {NEW_BIAS, NEW_TEXT} & own.keys()
    assert with_new_biases(own, _random(ITEMS, HEAD.dim, seed=5)) is own


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.1),
        ({"item_ids": "none"}, 0.1),
        ({"item_met": False}, 0.0),
        ({"item_bias": False}, 0.0),
        ({"item_ids": "codes"}, 0.0),
        ({"item_dropout": 0.0}, 0.0),
    ],
)
def test_it_is_on_where_it_has_an_effect(settings: dict[str, object], expected: float) -> None:
    head = HeadConfig.model_validate(settings)
    assert head.item_dropout == expected
    assert HeadConfig.model_validate(head.model_dump(mode="json")) == head


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"item_met": False}, "item_met: true"),
        ({"item_bias": False}, "item_bias: true"),
        ({"item_ids": ItemIds.CODES}, "item_ids: codes"),
    ],
)
def test_what_makes_it_impossible_is_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        HeadConfig.model_validate({"item_dropout": 0.1, **settings})
