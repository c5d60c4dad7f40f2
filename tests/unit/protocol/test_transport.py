"""Messages of half the bytes: what is rounded, and what stays exact."""

import pytest
import torch

from pfm_llm.base.errors import ContractError
from pfm_llm.config.schema import FederationConfig, parse_config, training_hash
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.parameters import Parameter, ParameterTable, Sizes
from pfm_llm.protocol.transport import as_received, as_sent, broadcast
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.server import Server

EXACT, ROUNDED = 1.0, 1 + 2**-10
"""Numbers that bfloat16 keeps, and rounds to the first one."""
PARAMETERS = [
    Parameter("head.x", (2,), 1.0, lambda: torch.full((2,), ROUNDED)),
    Parameter("head.y", (3,), 1.0, lambda: torch.full((3,), ROUNDED), sent=False),
]
HASHES = {"backbone_hash": "b", "prompt_hash": "p", "catalogue_hash": "c"}


def test_a_message_has_half_the_bytes_and_a_contract_of_its_own() -> None:
    whole, half = ParameterTable(PARAMETERS), ParameterTable(PARAMETERS, "bfloat16")
    assert (whole.num_bytes, half.num_bytes) == (8, 4)
    assert whole.held_bytes == half.held_bytes == 8
    assert half.sent == {"head.x": TensorSpec((2,), "bfloat16")}
    assert half.specs == whole.specs
    assert half.contract(**HASHES).hash() != whole.contract(**HASHES).hash()


def test_clients_receive_rounded_numbers_of_what_is_sent_alone() -> None:
    table = ParameterTable(PARAMETERS, "bfloat16")
    state = SharedState(table.initial_state().tensors, 7)
    received = broadcast(state, table.sent)
    assert received.round_number == 7
    assert received.tensors["head.x"].tolist() == [EXACT] * 2
    assert received.tensors["head.y"].tolist() == [ROUNDED] * 3
    assert {tensor.dtype for tensor in received.tensors.values()} == {torch.float32}
    exact = broadcast(state, ParameterTable(PARAMETERS).sent)
    assert all(exact.tensors[name] is tensor for name, tensor in state.tensors.items())


def test_what_is_sent_has_the_types_of_the_contract() -> None:
    table = ParameterTable(PARAMETERS, "bfloat16")
    contract, delta = table.contract(**HASHES), {"head.x": torch.full((2,), ROUNDED)}
    with pytest.raises(ContractError, match=r"head\.x is float32\[2\], must be bfloat16\[2\]"):
        contract.build("a", 1, 3, 0.5, delta)
    update = contract.build("a", 1, 3, 0.5, as_sent(delta, contract.tensors))
    contract.check(update, 1)
    assert as_received(update.delta)["head.x"].tolist() == [EXACT] * 2
    update.delta["head.x"][0] = torch.nan  # type: ignore[index]
    with pytest.raises(ContractError, match="not finite"):
        contract.check(update, 1)


def test_steps_below_the_rounding_add_up_at_the_server() -> None:
    federation = {"num_rounds": 20, "cohort_size": 2, "transport": "bfloat16"}
    server_settings = {"optimizer": "average", "lr_schedule": "constant", "warmup_rounds": 0}
    config = FederationConfig.model_validate({**federation, "server": server_settings})
    table = ParameterTable([Parameter("head.x", (2,), 1.0, lambda: torch.ones(2))], "bfloat16")
    server = Server(table, table.contract(**HASHES), ["a", "b"], config, 0)
    step = {"head.x": torch.full((2,), 2.0**-10)}
    for round_number in range(1, 9):
        received = server.broadcast.tensors["head.x"]
        updates = WeightedMean()
        for client in server.select_cohort(round_number):
            delta = as_sent(step, server.contract.tensors)
            update = server.contract.build(client, round_number, 1, 0.5, delta)
            assert server.receive(updates, update), updates.tally.refusals
        server.aggregate(updates)
        assert server.shared.tensors["head.x"].tolist() == [1 + round_number * 2**-10] * 2
    # bfloat16 has no number between 1 and 1 + 2^-7, which is the sum of eight steps.
    assert received.tolist() == [1 + 2**-7] * 2
    assert server.broadcast.tensors["head.x"].tolist() == [1 + 2**-7] * 2


def test_the_default_is_not_dumped_and_changes_no_hash() -> None:
    plain = parse_config({"name": "x"})
    assert "transport" not in plain.model_dump()["federation"]
    assert training_hash(plain) == training_hash(
        parse_config({"name": "x", "federation": {"transport": "float32"}})
    )
    half = parse_config({"name": "x", "federation": {"transport": "bfloat16"}})
    assert half.model_dump(mode="json")["federation"]["transport"] == "bfloat16"
    assert training_hash(half) != training_hash(plain)
    sizes = Sizes(576, {"layers.29.o_proj": (576, 576)}, 7)
    assert 2 * parameter_table(half, sizes).num_bytes == parameter_table(plain, sizes).num_bytes
