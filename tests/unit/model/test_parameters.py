"""The table of an experiment: equal to what every method had before there was a table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.config.choices import ServerOptimizer
from pfm_llm.config.methods import SPECS, Method
from pfm_llm.config.model import AdaptersConfig, HeadConfig
from pfm_llm.config.schema import ExperimentConfig, parse_config
from pfm_llm.model.parameters import parameter_table
from pfm_llm.model.private.hyper_lora import by_token
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.parameters import Sizes, Unseen
from pfm_llm.protocol.types import Group, of_group
from tests.support.tables import config_of

ROOT = Path(__file__).parents[3]
GOLDEN = json.loads((ROOT / "tests/golden/parameters.json").read_text())
SIZES = Sizes(**GOLDEN["sizes"])
RATES = {"lr_lora": 1e-3, "lr_head": 3e-3, "lr_item_ids": 5e-3, "lr_item_bias": 7e-3}


def _config(case: str, optimizer: str = "fedadam") -> ExperimentConfig:
    method, _, task = case.partition("-")
    private: dict[str, Any] = {"rank": 3, "alpha": 4}
    if method != "fedsa_lora":  # it fixes the rank
        private["head_rank"] = 2
    head: dict[str, Any] = {"dim": 8, "id_dim": 4, "item_context": True, "item_dropout": 0.0}
    if method != "pfm_text":  # it has neither
        head |= {"item_bias": True, "item_ids": "both"}
    return parse_config(
        {
            "name": "tiny",
            "seed": 0,
            "method": method,
            "tasks": ["next_item", "like"] if task == "like" else ["next_item"],
            "data": {"split": "last_fraction"},
            "adapters": {"shared": {"rank": 2, "alpha": 4}, "private": private},
            "head": head,
            "federation": {"server": {"optimizer": optimizer, "lr_scale": 1.5, **RATES}},
        }
    )


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_names_shapes_rates_what_is_sent_and_the_contract_are_as_before(case: str) -> None:
    table, expected = parameter_table(_config(case), SIZES), GOLDEN["cases"][case]
    found = {name: [list(one.shape), one.rate, one.sent] for name, one in table.items()}
    assert found == expected["tensors"]
    hashes = {f"{what}_hash": what for what in ("backbone", "prompt", "catalogue")}
    assert table.contract(**hashes).hash() == expected["contract"]
    drawn = table.initial_state().tensors
    assert {name: TensorSpec.of(tensor) for name, tensor in drawn.items()} == table.specs


def test_the_golden_file_has_every_method_and_task() -> None:
    methods = {case.partition("-")[0] for case in GOLDEN["cases"]}
    assert methods == {method.value for method in SPECS if method is not Method.CUSTOM}
    assert len(GOLDEN["cases"]) == 2 * len(methods)


@pytest.mark.parametrize("case", ["pfm-like", "fedsa_lora-next_item"])
def test_an_average_takes_every_tensor_at_the_scale(case: str) -> None:
    table = parameter_table(_config(case, ServerOptimizer.AVERAGE), SIZES)
    assert {parameter.rate for parameter in table.values()} == {1.5}


def test_what_has_rows_of_items_and_what_a_new_item_starts_with() -> None:
    table = parameter_table(_config("pfm-like"), SIZES)
    assert {name: table[name].unseen for name in table.per_item} == {
        "head.item_bias": Unseen.MEAN,
        "head.item_met": Unseen.ZERO,
        "head.item_ids": Unseen.ZERO,
        "head.like_bias": Unseen.MEAN,
        "basis.taste.next_item.read_in": Unseen.ZERO,
        "basis.taste.next_item.read_out": Unseen.MEAN,
        "basis.taste.like.items": Unseen.ZERO,
    }
    assert all(table[name].shape[0] == SIZES.num_items for name in table.per_item)
    by_text = parameter_table(_config("pfm_text-like"), SIZES)
    assert by_text.per_item == ("head.item_met",)


@pytest.mark.parametrize("on_layers", [True, False])
def test_a_shared_basis_has_a_term_of_the_head_where_that_has_a_rank(on_layers: bool) -> None:
    private = {"kind": "shared_basis", "rank": 3, "head_rank": 2, "on_layers": on_layers}
    adapters = AdaptersConfig.model_validate({"private": private})
    table = parameter_table(config_of(HeadConfig(dim=8), adapters), SIZES)
    bases = {name: one.shape for name, one in of_group(table, Group.BASIS).items()}
    of_modules = {f"basis.{name}.A": (3, fan_in) for name, (fan_in, _) in SIZES.modules.items()}
    assert bases == {**(of_modules if on_layers else {}), "basis.head.A": (2, SIZES.hidden_size)}
    assert {table[name].rate for name in bases} == {table[next(iter(table))].rate}
    off = AdaptersConfig.model_validate({"private": {**private, "enabled": False}})
    without = parameter_table(config_of(HeadConfig(dim=8), off), SIZES)
    assert of_group(without, Group.BASIS) == {}


def test_equal_seeds_draw_equal_bits() -> None:
    first, again, other = (
        parameter_table(_config("pfm-like").model_copy(update={"seed": seed}), SIZES)
        for seed in (0, 0, 1)
    )
    drawn = {
        name for name, one in first.items() if not torch.equal(one.initial(), other[name].initial())
    }
    assert drawn == {
        *(f"lora.{module}.A" for module in SIZES.modules),
        "head.item_ids",
        "basis.taste.next_item.read_in",
        "basis.taste.like.text",
        "basis.taste.like.ids",
        *(f"basis.hyper_lora.{module}.A" for module in by_token(SIZES.modules)),
        *(f"basis.hyper_lora.{module}.coefficients" for module in by_token(SIZES.modules)),
    }
    assert all(torch.equal(one.initial(), again[name].initial()) for name, one in first.items())


def test_a_server_runs_a_round_without_a_language_model() -> None:
    """In a process of its own, so that nobody else has imported the libraries."""
    script = """
import sys
import torch
from pfm_llm.config.schema import parse_config
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.server.aggregation import WeightedMean
from pfm_llm.server.server import Server

federation = {"num_rounds": 2, "cohort_size": 2, "server": {"warmup_rounds": 0}}
config = parse_config({"name": "far", "method": "pfm", "federation": federation})
table = parameter_table(config, Sizes(576, {"layers.29.o_proj": (576, 576)}, 7))
contract = table.contract(backbone_hash="b", prompt_hash="p", catalogue_hash="c")
server = Server(table, contract, ["a", "b"], config.federation, config.seed)
before, total = server.shared, WeightedMean()
for client_id in server.select_cohort(1):
    delta = {name: torch.full(one.shape, 1e-3) for name, one in table.items()}
    assert server.receive(total, contract.build(client_id, 1, 3, 0.5, delta))
assert server.aggregate(total).num_updates == 2
for name, tensor in server.shared.tensors.items():
    assert bool((tensor > before.tensors[name]).all()), name
assert {"transformers", "peft"}.isdisjoint(sys.modules), "a language model's libraries"
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
