"""What a pass keeps of a history: the next one goes on from it, whatever the private part is."""

import dataclasses
import math

import pytest
import torch

from pfm_llm.config.model import HeadConfig
from pfm_llm.model.batches import ChunkBatch, collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.private.last_layer import LastTokens
from pfm_llm.protocol.types import PRIVATE_PREFIX
from tests.support.tiny_models import ARCHITECTURES, TinyCohort, make_cohort, random_window, stack

HEAD = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
PRIVATE = {"kind": "hyper_lora", "rank": 2, "alpha": 5}
WINDOWS = [
    random_window(lengths, seed) for seed, lengths in enumerate(([3, 1, 4], [2, 2], [1] * 6))
]


def _batch(cohort: TinyCohort) -> ChunkBatch:
    states = [[cohort.trunk_states(window)] for window in WINDOWS]
    return collate([[window] for window in WINDOWS], states, last_only=True)


def _stacked(cohort: TinyCohort, seed: int) -> dict[str, torch.Tensor]:
    """Shared tensors that are always the same, and private ones of a seed."""
    shared = {p.name: p.initial() for p in cohort.private.shared_parameters()}
    generator = torch.Generator().manual_seed(7)
    shared = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in shared.items()
    }
    clients = []
    for client in range(len(WINDOWS)):
        own = cohort.client_tensors(seed + client)
        fixed = cohort.client_tensors(1)
        same = {n: v for n, v in fixed.items() if not n.startswith(PRIVATE_PREFIX)}
        clients.append(own | same | shared)
    return stack(clients)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_that_goes_on_gives_what_a_whole_one_gives(architecture: str) -> None:
    cohort = make_cohort(architecture, HEAD, private=PRIVATE)
    model, batch = cohort.model, _batch(cohort)
    assert model.layers.keeps_tokens(cohort.private.lora_modules)
    before, after = _stacked(cohort, 10), _stacked(cohort, 20)
    parts = Parts(private_weight=0.7)
    expected = torch.cat(model.user_vectors(batch, after, parts))
    first = torch.cat(model.user_vectors(batch, before, Parts()))
    assert not torch.allclose(first, expected, atol=1e-2)
    model.layers.tokens = tokens = LastTokens()
    assert torch.equal(torch.cat(model.user_vectors(batch, before, Parts())), first)
    assert tokens.hidden is not None
    nothing = dataclasses.replace(batch, trunk=torch.full_like(batch.trunk, math.nan))
    found = torch.cat(model.user_vectors(nothing, after, parts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shared = torch.cat(model.user_vectors(nothing, after, Parts(private_weight=0)))
    model.layers.tokens = None
    whole = torch.cat(model.user_vectors(batch, after, Parts(private_weight=0)))
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)


def test_tokens_are_shared_out_and_joined_in_order() -> None:
    contexts = [torch.zeros(1), None, torch.ones(1)]
    whole = LastTokens(torch.arange(6.0).view(3, 2), torch.arange(3.0)[:, None], contexts)
    each = [LastTokens() for _ in range(3)]
    assert LastTokens.joined(each).hidden is None
    whole.fill(each)
    assert each[1].hidden is not None
    assert each[1].hidden.tolist() == [[2, 3]]
    again = LastTokens.joined(each[::-1])
    assert again.attended is not None
    assert again.attended.tolist() == [[2], [1], [0]]
    assert [context is None for context in again.contexts] == [False, True, False]
    assert again.contexts[0] is contexts[2]
    assert LastTokens.joined([*each, LastTokens()]).hidden is None


def test_a_part_that_acts_elsewhere_leaves_nothing_to_keep() -> None:
    cohort = make_cohort("llama", HEAD, private=PRIVATE)
    first, *_ = cohort.adapter.modules
    assert not cohort.model.layers.keeps_tokens([first])
    other = make_cohort("llama", HEAD, targets=["q_proj"], private={"kind": "independent"})
    assert not other.model.layers.keeps_tokens([])
