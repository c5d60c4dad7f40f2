"""The table of shared tensors: what it refuses, and what follows from it."""

import pytest
import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.parameters import Parameter, ParameterTable
from pfm_llm.protocol.types import Group, in_group, lora_modules, lora_name, of_group

_A, _B = lora_name("layers.3.mlp", "A"), lora_name("layers.3.mlp", "B")
_TABLE = ParameterTable(
    [
        Parameter(_A, (2, 3), 0.1, lambda: torch.ones(2, 3), sent=False),
        Parameter(_B, (4, 2), 0.1),
        Parameter("head.item_bias", (5,), 0.2, per_item=True),
    ]
)


@pytest.mark.parametrize("name", ["private.lora.A", "private.", "optimizer.step", "lora", ""])
def test_names_that_are_not_those_of_shared_tensors_are_refused(name: str) -> None:
    with pytest.raises(ContractError, match="be in a table of shared tensors"):
        ParameterTable([Parameter(name, (1,), 0.1)])


def test_a_name_that_is_declared_twice_is_refused() -> None:
    twice = [Parameter("head.x", (1,), 0.1), Parameter("head.x", (2,), 0.1)]
    with pytest.raises(ContractError, match=r"two parts of the model declare a tensor head\.x"):
        ParameterTable(twice)


def test_the_initial_state_has_every_tensor_in_order() -> None:
    state = _TABLE.initial_state()
    assert state.round_number == 0
    assert list(state.tensors) == list(_TABLE) == [_A, _B, "head.item_bias"]
    assert {n: TensorSpec.of(tensor) for n, tensor in state.tensors.items()} == _TABLE.specs
    assert [bool(tensor.any()) for tensor in state.tensors.values()] == [True, False, False]


def test_contract_and_bytes_are_those_of_what_is_sent() -> None:
    contract = _TABLE.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
    assert contract.tensors == {_B: TensorSpec((4, 2)), "head.item_bias": TensorSpec((5,))}
    assert (contract.backbone_hash, contract.prompt_hash, contract.catalogue_hash) == (*"bpc",)
    assert _TABLE.num_bytes == 4 * (4 * 2 + 5)
    assert _TABLE.per_item == ("head.item_bias",)


def test_groups_are_told_by_the_whole_first_part_of_a_name() -> None:
    assert in_group("head.x", Group.HEAD)
    assert not in_group("header.x", Group.HEAD)
    assert list(of_group(_TABLE, Group.LORA)) == [_A, _B]
    assert of_group(_TABLE, Group.BASIS) == {}
    assert lora_modules([*_TABLE, "basis.layers.3.mlp.A"]) == ["layers.3.mlp"]
