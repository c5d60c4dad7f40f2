"""Less like this: who falls, by how much, and who does not."""

import numpy as np
import pytest
import torch

from pfm_llm.agent.less import LEAST, Similarity

NUM = 100


@pytest.fixture
def similarity() -> Similarity:
    """Items on a half circle: the similar ones are those beside an item."""
    angles = torch.linspace(0, torch.pi, NUM)
    return Similarity(torch.stack([angles.cos(), angles.sin()], 1))


def test_the_neighbours_are_the_most_similar_items_without_the_item(similarity: Similarity) -> None:
    near = similarity.neighbours(50)
    assert len(near) == LEAST
    assert sorted(near) == [*range(40, 50), *range(51, 61)]
    assert set(near[:2]) == {49, 51}


def test_what_is_learned_of_items_counts_as_much_as_their_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    texts, learned = (torch.randn(NUM, 6, generator=generator) for _ in range(2))
    texts[7], learned[8] = texts[3], learned[3]
    texts[9], learned[9] = texts[3], learned[3]
    assert Similarity(texts).neighbours(3)[:2] in ([7, 9], [9, 7])
    both = Similarity(texts, learned).neighbours(3)
    assert both[0] == 9
    assert {7, 8} <= set(both)


def test_neighbours_fall_by_the_rule_and_others_stay(similarity: Similarity) -> None:
    scores, everybody = np.linspace(0, 1, NUM), np.ones(NUM, bool)
    found = similarity.lowered(scores, [50], 0.5, everybody)
    near = similarity.neighbours(50)
    others = np.setdiff1d(np.arange(NUM), near)
    np.testing.assert_array_equal(found[others], scores[others])
    fall = (scores - found)[near] / (0.5 * 4 * scores.std())
    np.testing.assert_allclose(fall, 1 - np.arange(LEAST) / (2 * LEAST))


def test_an_item_near_to_two_falls_once_by_the_most(similarity: Similarity) -> None:
    scores, everybody = np.linspace(0, 1, NUM), np.ones(NUM, bool)
    one, other, both = (
        similarity.lowered(scores, unwanted, 1.0, everybody) for unwanted in ([50], [55], [50, 55])
    )
    np.testing.assert_array_equal(both, np.minimum(one, other))


def test_nothing_changes_without_a_wish_a_strength_or_a_candidate(similarity: Similarity) -> None:
    scores, everybody = np.linspace(0, 1, NUM), np.ones(NUM, bool)
    for unwanted, strength, candidates in (
        ([], 1.0, everybody),
        ([1], 0.0, everybody),
        ([1], 1.0, ~everybody),
    ):
        assert similarity.lowered(scores, unwanted, strength, candidates) is scores


def test_a_catalogue_of_one_item_has_no_neighbours() -> None:
    assert Similarity(torch.ones(1, 3)).neighbours(0) == []
