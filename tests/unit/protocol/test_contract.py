"""The update contract: an allow-list when an update is made, a judge when it arrives."""

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.protocol.contract import MAX_EXAMPLES, TensorSpec, UpdateContract
from pfm_llm.protocol.types import ClientUpdate

_NAME = "lora.model.layers.3.self_attn.q_proj.A"


def _tensors() -> dict[str, torch.Tensor]:
    return {_NAME: torch.arange(6.0).reshape(2, 3), "head.item_bias": torch.ones(4)}


def _contract(**changes: Any) -> UpdateContract:
    hashes = {"backbone_hash": "b", "prompt_hash": "p", "catalogue_hash": "c", **changes}
    return UpdateContract({n: TensorSpec.of(t) for n, t in _tensors().items()}, **hashes)


def _update(**changes: Any) -> ClientUpdate:
    made = _contract().build("u1", 5, 7, 2.5, _tensors())
    return dataclasses.replace(made, **changes)


def test_what_build_makes_passes_check() -> None:
    update = _contract().build("u1", 5, 7, 2.5, _tensors())
    _contract().check(update, 5)
    assert (update.client_id, update.num_examples, update.loss) == ("u1", 7, 2.5)
    assert list(update.delta) == list(_contract().tensors)
    assert all(torch.equal(update.delta[name], tensor) for name, tensor in _tensors().items())


@pytest.mark.parametrize("name", ["private.lora.A", "private."])
def test_private_names_can_never_be_in_a_contract(name: str) -> None:
    with pytest.raises(ContractError, match="is private and can never be in a contract"):
        UpdateContract({name: TensorSpec((1,))}, "b", "p", "c")


@pytest.mark.parametrize("name", ["lora", "Private.x", " private.x", "optimizer.step", ""])
def test_only_known_groups_can_be_in_a_contract(name: str) -> None:
    with pytest.raises(ContractError, match="shared tensors begin with"):
        UpdateContract({name: TensorSpec((1,))}, "b", "p", "c")


@pytest.mark.parametrize("field", ["backbone_hash", "prompt_hash", "catalogue_hash"])
def test_hash_binds_each_identity(field: str) -> None:
    assert _contract(**{field: "other"}).hash() != _contract().hash()
    with pytest.raises(ContractError, match=f"{field} is empty"):
        _contract(**{field: ""})


@pytest.mark.parametrize(
    "tensors",
    [
        {_NAME: TensorSpec((2, 3))},
        {_NAME: TensorSpec((2, 3)), "head.item_bias": TensorSpec((5,))},
        {_NAME: TensorSpec((2, 3)), "head.item_bias": TensorSpec((4,), "float16")},
        {_NAME: TensorSpec((2, 3)), "head.item_biases": TensorSpec((4,))},
    ],
)
def test_hash_binds_names_shapes_and_dtypes(tensors: dict[str, TensorSpec]) -> None:
    assert UpdateContract(tensors, "b", "p", "c").hash() != _contract().hash()


def test_hash_does_not_depend_on_the_order_of_tensors() -> None:
    reordered = dict(reversed(list(_contract().tensors.items())))
    assert UpdateContract(reordered, "b", "p", "c").hash() == _contract().hash()


def test_contract_does_not_change_with_the_dict_it_was_made_from() -> None:
    specs = {_NAME: TensorSpec((2, 3))}
    contract = UpdateContract(specs, "b", "p", "c")
    specs["private.x"] = TensorSpec((1,))
    assert list(contract.tensors) == [_NAME]


def test_build_clones_and_detaches() -> None:
    source = {name: t.requires_grad_() for name, t in _tensors().items()}
    update = _contract().build("u1", 1, 1, 0.0, source)
    with torch.no_grad():
        source[_NAME].zero_()
    assert torch.equal(update.delta[_NAME], _tensors()[_NAME])
    assert not any(tensor.requires_grad for tensor in update.delta.values())


def test_build_leaves_no_neighbour_in_the_storage() -> None:
    """A slice of a stack of clients must not carry the stack when it is pickled."""
    secret = 12345.678
    stack = torch.full((3, 2, 3), secret)
    stack[0] = 0.0
    delta = _tensors() | {_NAME: stack[0]}
    update = _contract().build("u1", 1, 1, 0.0, delta)
    pattern = torch.tensor(secret).numpy().tobytes()

    def pickled(tensor: torch.Tensor) -> bytes:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return buffer.getvalue()

    assert pattern in pickled(stack[0])  # so the search would find it
    assert pattern not in pickled(update.delta[_NAME])


def test_build_makes_transposed_slices_contiguous() -> None:
    update = _contract().build("u1", 1, 1, 0.0, _tensors() | {_NAME: torch.zeros(3, 2).T})
    assert update.delta[_NAME].is_contiguous()


def test_build_lets_values_through_for_the_server_to_count() -> None:
    update = _contract().build(
        "u1", 1, 1, math.nan, _tensors() | {_NAME: torch.full((2, 3), math.nan)}
    )
    with pytest.raises(ContractError):
        _contract().check(update, 1)


_BAD_DELTAS = [
    ({_NAME: torch.zeros(2, 3)}, "lacks 'head.item_bias'"),
    (_tensors() | {"head.extra": torch.zeros(1)}, "has 'head.extra', not in the contract"),
    (_tensors() | {"private.lora.A": torch.zeros(1)}, "private tensors never leave"),
    (_tensors() | {"head.item_bias": torch.zeros(4, 1)}, r"float32\[4, 1\], must be float32\[4\]"),
    (_tensors() | {"head.item_bias": torch.zeros(4).half()}, "item_bias is float16"),
    (_tensors() | {"head.item_bias": [0.0] * 4}, "item_bias is not a dense tensor"),
    (_tensors() | {"head.item_bias": torch.zeros(4).to_sparse()}, "is not a dense tensor"),
    ({}, "lacks"),
    ([], "holds no named tensors"),
]


@pytest.mark.parametrize(("delta", "message"), _BAD_DELTAS)
def test_wrong_tensors_are_refused_on_both_sides(delta: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        _contract().build("u1", 1, 1, 0.0, delta)
    with pytest.raises(ContractError, match=message):
        _contract().check(_update(delta=delta), 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_value_that_is_not_finite_is_refused(value: float) -> None:
    bias = torch.tensor([0.0, 1.0, value, 2.0])
    update = _update(delta=_tensors() | {"head.item_bias": bias})
    with pytest.raises(ContractError, match=r"'u1': head.item_bias .* not finite"):
        _contract().check(update, 5)


def test_the_largest_finite_values_are_accepted() -> None:
    bias = torch.full((4,), torch.finfo(torch.float32).max)
    _contract().check(_update(delta=_tensors() | {"head.item_bias": bias}), 5)


@pytest.mark.parametrize("num_examples", [0, -1, 1.0, True, "3", None, MAX_EXAMPLES + 1])
def test_bad_number_of_examples_is_refused(num_examples: Any) -> None:
    with pytest.raises(ContractError, match="num_examples is"):
        _contract().check(_update(num_examples=num_examples), 5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1, None, "0.1"])
def test_bad_loss_is_refused(loss: Any) -> None:
    with pytest.raises(ContractError, match="loss is"):
        _contract().check(_update(loss=loss), 5)


@pytest.mark.parametrize("round_number", [4, 6])
def test_wrong_round_is_refused(round_number: int) -> None:
    with pytest.raises(ContractError, match=f"round 5, but round {round_number} is under way"):
        _contract().check(_update(), round_number)


@pytest.mark.parametrize("contract_hash", ["", "0" * 64])
def test_wrong_contract_is_refused(contract_hash: Any) -> None:
    with pytest.raises(ContractError, match=r"backbone, prompt, .* or adapter shapes differ"):
        _contract().check(_update(contract_hash=contract_hash), 5)


def test_messages_of_hostile_updates_stay_short_and_on_one_line() -> None:
    names = {"x\n" * 1000 + str(index): torch.zeros(1) for index in range(100)}
    with pytest.raises(ContractError) as raised:
        _contract().check(_update(client_id="\n" * 1000, delta=_tensors() | names), 5)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
    assert "and 97 more" in str(raised.value)


def _kind_of(value: Any) -> str:
    """An id of a test; some of the values cannot be written."""
    return value if isinstance(value, str) and value.isidentifier() else type(value).__name__


_FIELDS = {
    "client_id": [None, 1, b"u1", ["u1"], torch.ones(2), math.nan],
    "round_number": [True, 5.0, "5", None, np.int64(5), torch.tensor([5, 5]), 10**5000],
    "contract_hash": [None, b"", torch.ones(2), 10**5000],
    "num_examples": [np.int64(3), torch.tensor(3), 10**5000, -(10**5000), math.nan, [3]],
    "loss": [True, np.float64(1), torch.tensor(1.0), 1j, 1e7, -1e300, [0.5]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in _FIELDS.items() for value in values],
    ids=_kind_of,
)
def test_fields_of_another_type_or_beyond_all_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ContractError) as raised:
        _contract().check(_update(**{field: value}), 1 if value is True else 5)
    assert raised.value.reason in ("malformed", "not_finite", "too_large", "round")
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("value", [None, {}, "update", b"", [], object(), ClientUpdate])
def test_anything_in_place_of_an_update_is_refused(value: Any) -> None:
    with pytest.raises(ContractError, match="arrived in place of an update"):
        _contract().check(value, 5)


def _without_memory() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def _from_inside_vmap() -> torch.Tensor:
    """A tensor that looks like any other until it is read."""
    seen: list[torch.Tensor] = []

    def function(value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        return value.sum()

    torch.func.vmap(function)(torch.ones(2, 4))
    return seen[0]


class _Subclass(torch.Tensor):
    """A tensor of another type, whose answers are its own."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(4, requires_grad=True), "carries a graph"),
        (lambda: torch.ones(4, requires_grad=True) * 2, "carries a graph"),
        (lambda: torch.ones(8)[::2], "is a view with another layout of memory"),
        (lambda: torch.ones(()).expand(4), "is a view with another layout of memory"),
        (lambda: torch.ones(7).as_strided((4,), (0,)), "is a view with another layout of memory"),
        (lambda: torch._neg_view(torch.ones(4)), "is a view with another layout of memory"),
        (_without_memory, "is larger than its memory"),
        (lambda: torch.nn.Parameter(torch.ones(4)), "is not a dense tensor"),
        (lambda: torch.ones(4).as_subclass(_Subclass), "is not a dense tensor"),
        (lambda: torch.ones(4, dtype=torch.complex64), "is complex64"),
        (lambda: torch.ones(4, dtype=torch.complex64).conj(), "is complex64"),
        (lambda: (1j * torch.ones(4)).conj().imag, "is a view with another layout of memory"),
        (lambda: torch.ones(4, dtype=torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "is qint8"),
        (_from_inside_vmap, "is a tensor that cannot be read"),
        (lambda: torch.tensor(1.0), r"is float32\[\]"),
        (lambda: np.ones(4, dtype=np.float32), "is not a dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_tensors_that_build_cannot_have_made_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ContractError, match=rf"'u1': head\.item_bias {message}") as raised:
        _contract().check(_update(delta=_tensors() | {"head.item_bias": make()}), 5)
    assert raised.value.reason == "malformed"


def test_a_part_of_a_larger_message_is_a_plain_tensor() -> None:
    """As a transport reads them: tensors that share the memory of one message."""
    bias = torch.ones(20)[8:12]
    _contract().check(_update(delta=_tensors() | {"head.item_bias": bias}), 5)


@pytest.mark.parametrize("name", [10**5000, None, ("head",), "\ud800", "x" * 10**5], ids=type)
def test_odd_names_are_refused_and_shown_short(name: Any) -> None:
    with pytest.raises(ContractError, match="not in the contract") as raised:
        _contract().check(_update(delta=_tensors() | {name: torch.zeros(1)}), 5)
    assert len(str(raised.value)) < 300
    assert raised.value.reason == "contract"
