"""A server that has the catalogue and no interaction is the one that has seen everything."""

from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.settings import are_of_server
from pfm_llm.data.sources import load_catalogue
from pfm_llm.federation.server_side import ServerSide, assemble_server
from pfm_llm.model.items.fitted import FittedTexts
from tests.conftest import TinyConfig, TinyRun
from tests.support.tiny import Tiny

CODES = {"head__item_ids": "codes", "head__codes": {"text_size": 4, "hash_size": 16}}


@pytest.fixture
def server_side(tiny: Tiny, tiny_config: TinyConfig) -> Any:
    """Makes the server's side of the tiny experiment, from its file of items alone."""

    def make(**settings: Any) -> ServerSide:
        config = tiny_config(data={"source": "/nowhere/to/be/found.csv"}, **settings)
        return assemble_server(config, load_catalogue(str(tiny.items)), torch.device("cpu"))

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "pfm"},
        {"method": "pfm_embedding"},
        {"method": "ffa_lora"},
        {"method": "pfm", **CODES},
    ],
    ids=["pfm", "pfm_embedding", "ffa_lora", "codes"],
)
def test_the_server_needs_no_interaction_to_know_its_state(
    tiny_run: TinyRun, server_side: Any, settings: dict[str, Any]
) -> None:
    whole, side = tiny_run(**settings).model, server_side(**settings)
    own = side.model
    assert own.contract.hash() == whole.contract.hash()
    assert own.shared.tensors.keys() == whole.shared.tensors.keys()
    for name, tensor in whole.shared.tensors.items():
        assert torch.equal(own.shared.tensors[name], tensor), name
    for name, tensor in whole.fitted.tensors.items():
        assert torch.equal(side.given[name], tensor), name


def test_what_nobody_trains_is_given_to_the_nodes(server_side: Any) -> None:
    frozen = {n for n in server_side(method="ffa_lora").given if n.startswith("untrained/")}
    assert frozen
    assert all(name.endswith(".A") for name in frozen)
    assert not any(n.startswith("untrained/") for n in server_side(method="pfm").given)


def test_the_invitation_holds_nothing_of_the_servers_machine(server_side: Any) -> None:
    settings = server_side(method="pfm").invitation.settings
    assert are_of_server(settings)
    assert "source" not in settings["data"]
    assert "dtype" not in settings["backbone"]
    assert {"output", "cache", "runtime", "evaluation"}.isdisjoint(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"source": "x.csv"}},
        {"output": {}},
        {"backbone": {"dtype": "float32"}},
        {"data": 1},
    ],
)
def test_settings_of_a_node_are_not_the_servers(settings: dict[str, Any]) -> None:
    assert not are_of_server({"seed": 1, **settings})


def test_every_setting_and_tensor_counts_in_the_agreement(server_side: Any) -> None:
    first = server_side(method="pfm").agreement
    assert server_side(method="pfm").agreement.hash() == first.hash()
    other = server_side(method="pfm", window={"items": 5}).agreement
    assert first.difference(other) == "settings"
    assert first.hash() != other.hash()
    other = server_side(method="pfm", head__dim=7).agreement
    assert first.difference(other) == "contract, settings"
    cohort = server_side(method="pfm", federation__cohort_size=3).agreement
    assert cohort.difference(first) == ""  # it follows from the number of clients


POISSON = {
    "head__item_met": False,
    "federation__stages": [{"clip": {"norm": 0.5}}],
    "federation__privacy": {
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "participation": "poisson",
    },
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"split": "global_temporal"}}, "global_temporal puts its cuts"),
        ({"data": {"met_items_only": True}}, "met_items_only needs to know"),
        ({"federation__server__aggregator": "median"}, "median needs single updates"),
        (
            POISSON,
            "draws a round that is repeated anew.*set it to passes where",
        ),
    ],
)
def test_what_needs_all_data_in_one_place_is_refused(
    tiny: Tiny, tiny_config: TinyConfig, settings: dict[str, Any], message: str
) -> None:
    config = tiny_config(method="pfm", **settings)
    with pytest.raises(ConfigError, match=message):
        assemble_server(config, load_catalogue(str(tiny.items)), torch.device("cpu"))


def test_fitted_texts_survive_their_tensors(server_side: Any) -> None:
    fitted = server_side(method="pfm", **CODES).model.fitted
    again = FittedTexts.from_tensors(fitted.tensors)
    assert again.tensors.keys() == fitted.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in fitted.tensors.items())
    assert again.item_normaliser is again.normaliser  # the tiny backbone encodes its items too
