"""What items share: where codes come from, what they sum up, and who counts as met."""

import dataclasses
import hashlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ArtefactError, DataError
from pfm_llm.config.choices import ItemIds
from pfm_llm.config.model import AdaptersConfig, CodesConfig, HeadConfig
from pfm_llm.model.batches import stacked_tensors
from pfm_llm.model.cohort import Parts
from pfm_llm.model.head import ITEM_BIAS, ITEM_IDS, ITEM_MET, met_items, met_term
from pfm_llm.model.items.codes import ItemCodes, coded, make_codes, num_vectors
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import Parameter, Sizes
from tests.support.tables import config_of
from tests.support.tiny_models import (
    CLIENT_WINDOWS,
    NUM_ITEMS,
    make_cohort,
    stack,
    stirred,
)
from tests.unit.model.test_cohort import _batch

KEYS = [f"key {number}" for number in range(40)]
TEXTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
BOTH = CodesConfig(text_books=2, text_size=5, hash_books=3, hash_size=7, met_size=50)


def plain(columns: Sequence[Sequence[int]], num_text: int = 0, **fields: object) -> ItemCodes:
    """Codes as they are given; an item's entry in the filter is its own."""
    known = torch.tensor(columns)
    own = torch.arange(len(known))[:, None]
    codes = ItemCodes(known, num_text, own)
    return dataclasses.replace(codes, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["independent", "taste"])
def test_items_with_a_vector_of_their_own_train_as_with_rows(kind: str) -> None:
    private = {"kind": kind, "rank": 2, "head_rank": 2, "taste": {"read_rank": 8}}
    head = HeadConfig(dim=8, id_dim=4)
    cohort = make_cohort(head=head, private=private)
    table = parameter_table(
        config_of(head, cohort.adapters), Sizes(32, cohort.adapter.modules, NUM_ITEMS)
    )
    names = tuple(name for name in table.per_item if name != ITEM_MET)
    assert {ITEM_BIAS, ITEM_IDS} <= set(names)
    batch = _batch(cohort, [own[:1] for own in CLIENT_WINDOWS])
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(1))
    inverse = order.argsort()

    def trained(codes: ItemCodes | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = cohort.model
        model.objective = dataclasses.replace(model.objective, codes=codes)
        clients = [cohort.client_tensors(seed) for seed in range(3)]
        if codes is not None:  # the vector of item i is in row order[i]
            clients = [{n: v[inverse] if n in names else v for n, v in c.items()} for c in clients]
        stacked = stack(clients)
        losses = torch.stack(model.losses(batch, stacked, Parts()))
        found = torch.autograd.grad(losses.sum(), list(stacked.values()), allow_unused=True)
        gradients = dict(zip(stacked, found, strict=True))
        if codes is not None:
            for name in names:
                if gradients.get(name) is not None:
                    gradients[name] = gradients[name][:, order]
        return losses.detach(), {n: g for n, g in gradients.items() if g is not None}

    losses, gradients = trained(None)
    again, same = trained(plain(order[:, None].tolist(), names=names))
    assert torch.equal(losses, again)
    assert gradients.keys() == same.keys()
    assert gradients[ITEM_IDS].any()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same[name], rtol=1e-6, atol=1e-7)


def test_a_row_is_the_sum_of_its_vectors_and_each_gets_the_gradient() -> None:
    codes = plain([[0, 3], [1, 3], [0, 0]])
    table = torch.arange(8.0).view(4, 2).requires_grad_()
    rows = codes.rows(table)
    assert rows.tolist() == [[0 + 6, 1 + 7], [2 + 6, 3 + 7], [0 + 0, 1 + 1]]
    weights = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    (gradient,) = torch.autograd.grad((rows * weights).sum(), table)
    # Vector 0: item 0, and twice item 2; vector 3: items 0 and 1.
    assert gradient.tolist() == [[1 + 8, 10 + 80], [2, 20], [0, 0], [1 + 2, 10 + 20]]
    assert codes.rows(table[:, 0]).tolist() == rows[:, 0].tolist()
    deep = table.view(4, 2, 1)
    assert torch.equal(codes.rows(deep), rows[..., None])


def test_an_item_that_nobody_has_met_has_the_vectors_of_its_text_alone() -> None:
    codes = plain([[0, 2], [1, 2]], num_text=1, names=(ITEM_BIAS,))
    own = {ITEM_BIAS: torch.tensor([1.0, 10.0, 100.0]), ITEM_MET: torch.tensor([0.5, 0.0])}
    found = codes.expanded({**own, "head.item_proj": torch.eye(2)})
    assert found[ITEM_BIAS].tolist() == [101.0, 10.0]
    assert met_items(found) is not None
    assert found[ITEM_MET].tolist() == [0.5, 0.0]
    assert torch.equal(found["head.item_proj"], torch.eye(2))
    del own[ITEM_MET]  # where it is not learned who has met what, all count as met
    assert codes.expanded(own)[ITEM_BIAS].tolist() == [101.0, 110.0]


@given(st.sets(st.integers(0, 39)), st.integers(1, 60))
def test_the_filter_knows_every_item_that_a_client_has_told(met: set[int], size: int) -> None:
    codes = make_codes(CodesConfig(text_books=0, met_size=size), KEYS, TEXTS)
    entries = torch.zeros(3 * size, requires_grad=True)
    told = codes.expanded({ITEM_MET: entries})
    items = torch.tensor(sorted(met), dtype=torch.int64)
    (gradient,) = torch.autograd.grad(met_term(told, items), entries)
    after = codes.expanded({ITEM_MET: entries.detach() - gradient})[ITEM_MET] > 0
    assert met <= set(after.nonzero().flatten().tolist())
    if not met:
        assert not after.any()


def test_a_filter_with_room_knows_hardly_an_item_that_nobody_has_met() -> None:
    keys = [str(number) for number in range(3000)]
    codes = make_codes(CodesConfig(text_books=0), keys, torch.zeros(3000, 2))
    entries = torch.zeros(3 * 8192)
    entries[codes.met[:1500]] = 1.0
    # Each book is filled to 1 - exp(-1500 / 8192) = 17 %, and .17^3 is half a percent.
    found = codes.expanded({ITEM_MET: entries})[ITEM_MET] > 0
    assert found[:1500].all()
    assert int(found[1500:].sum()) < 30


def test_codes_of_keys_are_those_of_the_key_on_every_machine() -> None:
    codes = make_codes(BOTH, ["a", "b"], TEXTS[:2], torch.zeros(2, 5, 6))
    digest = hashlib.shake_256(b"codes/a").digest(8 * 6)
    numbers = [int.from_bytes(digest[8 * k : 8 * k + 8], "little") for k in range(6)]
    own = [number % 7 + 10 + 7 * k for k, number in enumerate(numbers[:3])]
    assert codes.columns[0, 2:].tolist() == own
    assert codes.met[0].tolist() == [n % 50 + 50 * k for k, n in enumerate(numbers[3:])]


def test_an_item_has_its_codes_in_every_catalogue() -> None:
    here = make_codes(BOTH, KEYS, TEXTS)
    order = [7, 3, 11]
    keys, texts = [KEYS[item] for item in order], TEXTS[order]
    there = make_codes(BOTH, ["new", *keys], torch.cat([TEXTS[:1], texts]), here.centroids)
    assert torch.equal(there.columns[1:], here.columns[order])
    assert torch.equal(there.met[1:], here.met[order])
    # An item with the text of item 0 and another key has its text's codes alone.
    assert torch.equal(there.columns[0, :2], here.columns[0, :2])
    assert not torch.equal(there.columns[0, 2:], here.columns[0, 2:])


def test_codes_of_texts_are_equal_at_every_fit_and_tell_more_with_more_books() -> None:
    first, again = make_codes(BOTH, KEYS, TEXTS), make_codes(BOTH, KEYS, TEXTS)
    assert first.identity() == again.identity()
    assert first.centroids is not None
    assert again.centroids is not None
    assert torch.equal(first.centroids, again.centroids)
    assert first.identity() != make_codes(BOTH, KEYS[::-1], TEXTS).identity()
    centroids = first.centroids
    assert centroids.shape == (2, 5, 6)
    assert len(first.columns[:, 0].unique()) == 5
    assert set(first.columns[:, 1].tolist()) <= set(range(5, 10))
    one = TEXTS - centroids[0][first.columns[:, 0]]
    two = one - centroids[1][first.columns[:, 1] - 5]
    assert TEXTS.norm() > one.norm() > two.norm()
    nearest = torch.cdist(TEXTS, centroids[0]).argmin(1)
    assert torch.equal(first.columns[:, 0], nearest)


def test_more_vectors_than_different_texts_are_refused() -> None:
    texts = TEXTS[:3].repeat(4, 1)
    with pytest.raises(DataError, match=r"text_size: 5 exceeds the 3 different texts of the cat"):
        make_codes(BOTH, KEYS[:12], texts)
    assert make_codes(CodesConfig(text_books=0), KEYS[:12], texts).centroids is None


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 4, 6), (1, 5, 6)])
def test_centroids_of_other_books_or_texts_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ArtefactError, match=r"needs \[2, 5, 6\]; set head\.codes, head\.dim and"):
        make_codes(BOTH, KEYS, TEXTS, torch.zeros(shape))


def test_a_sum_of_vectors_is_drawn_as_a_row_is() -> None:
    def draw() -> torch.Tensor:
        return torch.randn(31, 400, generator=torch.Generator().manual_seed(5)) * 0.1

    one = coded(Parameter("head.x", (31, 400), 0.1, draw, per_item=True), BOTH)
    assert (one.per_item, one.per_code, one.shape) == (False, True, (num_vectors(BOTH), 400))
    rows = make_codes(BOTH, KEYS, TEXTS).rows(one.initial())
    assert float(rows.std()) == pytest.approx(0.1, rel=0.1)


def test_a_message_does_not_grow_with_the_catalogue() -> None:
    def table(num_items: int, **head: object) -> object:
        taste = AdaptersConfig.model_validate({"private": {"kind": "taste"}})
        config = config_of(HeadConfig.model_validate({"dim": 8, **head}), taste)
        return parameter_table(config, Sizes(32, {}, num_items)).specs

    assert table(11) != table(10**6)
    found = table(11, item_ids=ItemIds.CODES)
    assert found == table(10**6, item_ids="codes")


def test_clients_with_one_copy_of_the_tensors_share_the_sums() -> None:
    codes = make_codes(BOTH, KEYS, TEXTS, names=(ITEM_IDS,))
    shared = stirred({ITEM_IDS: torch.zeros(31, 2), ITEM_MET: torch.zeros(150)}, 1)
    slices = {n: v.unbind(0) for n, v in stacked_tensors(shared, 3, torch.device("cpu")).items()}
    owns = [{n: v[client] for n, v in slices.items()} for client in range(3)]
    first, second, _ = codes.expanded_clients(owns)
    assert first[ITEM_IDS] is second[ITEM_IDS]
    torch.testing.assert_close(first[ITEM_IDS], codes.expanded(shared)[ITEM_IDS])
    apart = [{name: tensor.clone() for name, tensor in own.items()} for own in owns]
    apart[1][ITEM_IDS] += 1
    one, other, _ = codes.expanded_clients(apart)
    assert not torch.equal(one[ITEM_IDS], other[ITEM_IDS])
