"""Attacks on updates whose content is known."""

import numpy as np
import pytest
import torch

from pfm_llm.audit import attacks
from pfm_llm.audit.view import View
from pfm_llm.model.head import ITEM_BIAS, ITEM_IDS, ITEM_MET, ITEM_PROJ
from pfm_llm.protocol.types import ClientUpdate

TEXTS = torch.eye(6)
MET = [1, 4]


def read(scores: dict[str, np.ndarray], name: str) -> list[int]:
    return sorted(attacks.read_items(scores[name], 6).tolist())


def test_items_are_read_off_rows_that_have_a_gradient() -> None:
    rows, bias, met = torch.zeros(6, 3), torch.full((6,), -0.1), torch.zeros(6)
    rows[MET] = -1.0
    bias[MET] = 0.9
    met[MET] = 1e-3
    scores = attacks.item_scores({ITEM_IDS: rows, ITEM_BIAS: bias, ITEM_MET: met}, TEXTS)
    assert {name: read(scores, name) for name in scores} == dict.fromkeys(
        (ITEM_MET, ITEM_BIAS, ITEM_IDS), MET
    )


def test_items_are_read_off_their_texts_where_no_tensor_has_rows_for_them() -> None:
    user = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 0.0])
    change = sum(torch.outer(user, TEXTS[item]) for item in MET)
    scores = attacks.item_scores({ITEM_PROJ: change, ITEM_IDS: torch.ones(2, 3)}, TEXTS)
    assert list(scores) == [ITEM_PROJ]
    assert read(scores, ITEM_PROJ) == MET


def test_an_untouched_tensor_tells_nothing() -> None:
    assert attacks.item_scores({ITEM_BIAS: torch.zeros(6)}, TEXTS) == {}


def test_no_more_items_are_taken_than_examples_were_stated() -> None:
    assert attacks.read_items(np.array([0.0, 3.0, 1.0, 2.0]), 2).tolist() == [1, 3]


def update(client_id: str, delta: torch.Tensor) -> ClientUpdate:
    return ClientUpdate(client_id, 1, "hash", 7, 1.0, {"head.x": delta})


def test_who_is_in_a_sum_scores_above_who_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 20 * torch.randn(400, generator=generator)  # what all updates share tells nothing
    deltas = {f"c{i}": common + torch.randn(400, generator=generator) for i in range(12)}
    suspects = attacks.Suspects({name: update(name, delta) for name, delta in deltas.items()})
    members = frozenset({"c1", "c7", "c8"})
    view = View({"head.x": sum((deltas[c] for c in members), torch.zeros(400))}, members, None)
    scores = suspects.scores(view, 3)
    are_in = suspects.are_in(view)
    assert are_in.tolist() == [name in members for name in deltas]
    assert scores[are_in].min() > scores[~are_in].max() + 0.3
    assert scores.max() <= 1.0 + 1e-6


def test_the_items_of_several_are_those_that_any_has_met() -> None:
    histories = {"a": frozenset({1, 2}), "b": frozenset({2, 3}), "c": frozenset({9})}
    assert attacks.union(histories, ["a", "b"]) == {1, 2, 3}


@pytest.mark.parametrize("count", [1, 2])
def test_a_score_does_not_depend_on_the_length_of_an_update(count: int) -> None:
    deltas = {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.tensor([0.0, 5.0, 0.0])}
    suspects = attacks.Suspects({name: update(name, delta) for name, delta in deltas.items()})
    view = View({"head.x": deltas["a"] * count + torch.tensor([0.0, 0.0, 0.0])}, frozenset("a"), 1)
    assert suspects.scores(view, count)[0] == pytest.approx(1.0)
