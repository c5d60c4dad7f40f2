"""FoolsGold: equal to the paper's algorithm, against those who follow one plan."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pfm_llm.protocol.types import ClientUpdate
from pfm_llm.server.robust import FoolsGold


def _aggregate(updates: Sequence[np.ndarray]) -> np.ndarray:
    """The aggregate of updates [n] in two tensors, of which a cosine has to see both."""
    total = FoolsGold()
    for number, update in enumerate(updates):
        whole = torch.tensor(update, dtype=torch.float32)
        delta = {"head.a": whole[:5], "lora.b": whole[5:].reshape(1, -1)}
        total.add(ClientUpdate(str(number), 1, "hash", 1, 0.0, delta), 1.0)
    found = total.result()
    return torch.cat([found["head.a"], found["lora.b"].flatten()]).numpy()


def _weights_of_the_paper(updates: np.ndarray) -> np.ndarray:
    """Algorithm 1 of arXiv 1808.04866, line by line, of one round, over the median."""
    count = len(updates)
    cosines = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            lengths = np.linalg.norm(updates[i]) * np.linalg.norm(updates[j])
            cosines[i, j] = updates[i] @ updates[j] / lengths
    largest = [max(cosines[i, j] for j in range(count) if j != i) for i in range(count)]
    for i in range(count):
        for j in range(count):
            if i != j and largest[j] > largest[i]:
                cosines[i, j] *= largest[i] / largest[j]
    weights = [1 - max(cosines[i, j] for j in range(count) if j != i) for i in range(count)]
    weights = np.minimum(np.array(weights) / sorted(weights)[(count - 1) // 2], 1)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(weights / (1 - weights)) + 0.5, 0, 1)


def _honest(count: int, seed: int = 0) -> np.ndarray:
    """Updates [count, 12] with a common part and one of their own."""
    source = np.random.default_rng(seed)
    return 3 * source.normal(size=12) + 1.5 * source.normal(size=(count, 12))


@pytest.mark.parametrize("seed", range(5))
def test_updates_count_as_in_the_paper(seed: int) -> None:
    honest = _honest(7, seed)
    updates = np.concatenate([honest, honest[:1] + 0.1])
    weights = _weights_of_the_paper(updates)
    assert weights.min() < weights.max()
    expected = weights @ updates / weights.sum()
    np.testing.assert_allclose(_aggregate(updates), expected, rtol=1e-4, atol=1e-6)


def test_those_who_follow_one_plan_do_not_count() -> None:
    honest = _honest(8)
    plan = -honest.mean(axis=0)
    with_them = _aggregate([*honest, plan, 2 * plan])
    np.testing.assert_allclose(with_them, _aggregate(list(honest)), rtol=1e-5, atol=1e-6)
    mean = np.mean([*honest, plan, 2 * plan], axis=0)
    assert np.linalg.norm(mean - with_them) > 0.3 * np.linalg.norm(with_them)


def test_one_who_is_like_nobody_does_not_silence_the_others() -> None:
    honest = _honest(8)
    with_zeros = _aggregate([*honest, np.zeros(12)])
    np.testing.assert_allclose(9 * with_zeros, 8 * _aggregate(list(honest)), rtol=0.2, atol=0.5)


def test_a_length_is_no_direction() -> None:
    updates = _honest(4)
    found = _aggregate([1e6 * updates[0], *updates[1:]])
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) > 1e4  # which is why a clip comes before it


def test_where_all_are_alike_all_count() -> None:
    same = _honest(1)[0]
    np.testing.assert_array_equal(_aggregate([same] * 3), same.astype(np.float32))
