"""Products of private tensors with shared ones are found, from which anybody could divide."""

import base64
import itertools
import json

import pytest
import torch

from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish.leak_search import DTYPES, PRODUCT, TEXT, find_private_in
from pfm_llm.publish.products import RUN, Products
from tests.support.exports import numbers_as

OUT, IN = 41, 24
VECTOR = "private.lora.layer"


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def basis(rank: int) -> dict[str, torch.Tensor]:
    return {"basis.layer.A": drawn(rank, IN, seed=1), "basis.layer.B": drawn(OUT, rank, seed=2)}


def state(tensor: torch.Tensor, client_id: str = "user-1") -> PrivateState:
    return PrivateState(client_id, 3, {VECTOR: tensor})


def honest(rank: int) -> bytes:
    """The bytes of a folder with both factors."""
    return b"".join(numbers_as(value, torch.float32) for value in basis(rank).values())


def forms(content: bytes, vector: torch.Tensor, products: Products | None) -> set[str]:
    """In which forms products of a vector are in a content."""
    found = find_private_in({"file": content}, [state(vector)], products)
    return {hit.dtype.removeprefix(PRODUCT) for hit in found}


def product(name: str, rank: int, vector: torch.Tensor) -> torch.Tensor:
    a, b = basis(rank).values()
    return {"s B c": b * vector, "c A": vector[:, None] * a, "B c A": (b * vector) @ a}[name]


PRODUCTS = ("s B c", "c A", "B c A")


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_found_in_any_dtype_at_any_offset(
    name: str, transposed: bool, rank: int
) -> None:
    vector = drawn(rank, seed=3)
    secret = product(name, rank, vector)
    secret = secret.T if transposed else secret
    products = Products([basis(rank)])
    for offset, dtype in enumerate(DTYPES, 1):
        content = honest(rank) + b"x" * offset + numbers_as(secret, dtype) + b"x"
        assert forms(content, vector, products) == {str(dtype).removeprefix("torch.")}
        assert forms(content, vector, None) == set()  # no number of the vector is there


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_an_honest_folder_holds_no_product(rank: int) -> None:
    products = Products([basis(rank)], [2.0])
    states = [state(drawn(rank, seed=seed), f"user-{seed}") for seed in range(10, 60)]
    public = honest(rank) + numbers_as(drawn(100_000, seed=5), torch.float32)
    table = json.dumps(drawn(500, seed=7).tolist()).encode()
    assert find_private_in({"weights": public, "table": table}, states, products) == []


@pytest.mark.parametrize("scale", [1.0, 1.5, 1.5 * 0.7])
def test_the_order_in_which_a_product_is_rounded_does_not_matter(scale: float) -> None:
    a, b = basis(16).values()
    vector = drawn(16, seed=3)
    products = Products([basis(16)], [1.5, 1.5 * 0.7])
    orders = [
        (b * scale) * vector,
        b * (vector * scale),
        (b * vector) * scale,
        (b.double() * vector.double() * scale).float(),
    ]
    for order in (*orders, *((order @ a) for order in orders)):
        for dtype in (torch.float32, torch.float64):
            content = numbers_as(order, dtype)
            assert forms(content, vector, products) == {str(dtype).removeprefix("torch.")}


def test_a_scale_that_is_not_given_hides_a_product() -> None:
    vector = drawn(16, seed=3)
    content = numbers_as(product("s B c", 16, vector) * 1.5, torch.float32)
    assert forms(content, vector, Products([basis(16)])) == set()
    assert forms(content, vector, Products([basis(16)], [1.5])) == {"float32"}


@pytest.mark.parametrize("rank", [8, 9, 10, 11, 12])
def test_a_product_beside_the_columns_of_another_factor_is_found(rank: int) -> None:
    """PEFT's ``cat`` puts two LoRAs side by side along the rank."""
    vector, products = drawn(rank, seed=3), Products([basis(rank)])
    wider = torch.cat([drawn(OUT, 8, seed=4), product("s B c", rank, vector)], 1)
    most = wider[1:-1]  # not the first row and the last, where any run stays in its row
    assert forms(numbers_as(most, torch.float32), vector, products) == {"float32"}


def test_a_product_is_found_as_text_and_encoded() -> None:
    vector = drawn(16, seed=3)
    secret, products = product("s B c", 16, vector), Products([basis(16)])
    assert forms(json.dumps(secret.tolist()).encode(), vector, products) == {TEXT}
    raw = numbers_as(secret, torch.float32)
    for encoded in (raw.hex(), base64.b64encode(raw).decode()):
        assert forms(f'{{"blob": "{encoded}"}}'.encode(), vector, products) == {"float32"}


def test_a_private_factor_is_found_with_the_scale_of_the_lora() -> None:
    secret = drawn(OUT, 4, seed=3)
    content = numbers_as(1.5 * secret, torch.float32)
    assert forms(content, secret, Products([], [1.5])) == {"float32"}
    assert forms(content, secret, Products([])) == set()
    assert forms(numbers_as(secret, torch.float32), secret, None) == {"float32"}


def test_a_vector_of_ones_tells_nothing() -> None:
    for vector in (torch.ones(16), 1 + 0.01 * torch.rand(16), torch.zeros(16)):
        assert forms(honest(16), vector, Products([basis(16)])) == set()
    half = Products([basis(16)], [2.0])
    assert forms(honest(16), torch.full((16,), 0.5), half) == set()
    one_other = torch.ones(16)
    one_other[3] = 0.5
    content = honest(16) + numbers_as(product("s B c", 16, one_other), torch.float32)
    assert forms(content, one_other, Products([basis(16)])) == {"float32"}


def test_rows_that_nobody_has_trained_do_not_hide_a_product() -> None:
    a, b = basis(16).values()
    for row in itertools.chain(range(0, 12), range(20, OUT)):
        b[row] = 0
    vector = drawn(16, seed=3)
    products = Products([{"basis.layer.A": a, "basis.layer.B": b}])
    for secret in (b * vector, (b * vector).T, (b * vector) @ a, ((b * vector) @ a).T):
        assert forms(numbers_as(secret, torch.float32), vector, products) == {"float32"}


def test_each_shared_state_gives_products() -> None:
    """A folder may hold a product in the place of a factor; then another state has the factor."""
    vector = drawn(16, seed=3)
    changed = basis(16) | {"basis.layer.B": product("s B c", 16, vector)}
    content = numbers_as(changed["basis.layer.B"], torch.float32)
    assert forms(content, vector, Products([changed])) == set()
    assert forms(content, vector, Products([changed, basis(16)])) == {"float32"}
    assert forms(content, vector, Products([basis(16), basis(16)])) == {"float32"}


def test_few_numbers_have_no_runs() -> None:
    tensors = {
        "basis.small.B": torch.ones(2, 3),
        "basis.small.A": torch.ones(3, 2),
        "basis.lone.B": drawn(9, 3, seed=1),
        "basis.vector": torch.ones(3),
        "basis.cube": torch.ones(3, 3, 3),
        "basis.empty": torch.ones(0, 3),
    }
    products = Products([tensors], [2.0])
    assert products.runs(torch.rand(3)).shape[1] == RUN
    assert not products.runs(torch.rand(5)).numel()
    assert not products.runs(torch.rand(2, 3)).numel()
    assert not products.runs(torch.tensor(1.0)).numel()
