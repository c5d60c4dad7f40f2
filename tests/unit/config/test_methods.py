"""Methods: what each fixes, what it leaves untrained, and what a config may not say beside it."""

import importlib
import re
from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import Regime
from pfm_llm.config.methods import SPECS, Method
from pfm_llm.config.schema import parse_config

SHARED_NAMES = (
    "lora.model.layers.3.self_attn.q_proj.A",
    "lora.model.layers.3.self_attn.q_proj.B",
    "head.state_proj",
    "head.item_proj",
    "basis.model.layers.3.self_attn.q_proj.A",
)


def _tree(**settings: Any) -> dict[str, Any]:
    return {"name": "x", **settings}


def test_every_method_has_a_file_of_its_name_with_its_equation() -> None:
    assert set(SPECS) == set(Method)
    for method, spec in SPECS.items():
        module = importlib.import_module(f"pfm_llm.config.methods.{method}")
        assert module.SPEC is spec
        if spec.settings:
            assert re.search(r"::\n\n    \S.* (=|<-) ", module.__doc__ or ""), method


@pytest.mark.parametrize(
    ("method", "untrained"),
    [
        (Method.CENTRAL, ()),
        (Method.LOCAL_ONLY, SHARED_NAMES),
        (Method.SHARED_ONLY, ()),
        (Method.FFA_LORA, SHARED_NAMES[:1]),
        (Method.FEDSA_LORA, SHARED_NAMES[:2]),
        (Method.FEDREP, SHARED_NAMES[2:3]),
        (Method.PFM, ()),
        (Method.PFM_EMBEDDING, ()),
        (Method.PFM_TEXT, ()),
        (Method.CUSTOM, ()),
    ],
)
def test_what_a_method_leaves_untrained(method: Method, untrained: tuple[str, ...]) -> None:
    assert tuple(n for n in SHARED_NAMES if not SPECS[method].trains(n)) == untrained


@pytest.mark.parametrize("method", Method)
def test_a_config_with_a_method_is_valid_and_says_what_it_fixes(method: Method) -> None:
    config = parse_config(_tree(method=method.value))
    tree = config.model_dump(mode="json")
    for key, value in SPECS[method].settings.items():
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        assert node == value
    assert parse_config(tree) == config  # the resolved config reads back


def test_a_setting_that_contradicts_the_method_is_an_error() -> None:
    message = r"shared_only fixes adapters\.private\.enabled: False.* set method: custom"
    with pytest.raises(ConfigError, match=message):
        parse_config(_tree(method="shared_only", adapters={"private": {"enabled": True}}))


def test_without_a_method_it_is_ours() -> None:
    assert parse_config(_tree()) == parse_config(_tree(method="pfm"))
    with pytest.raises(ConfigError, match=r"pfm fixes adapters\.private\.kind: hyper_lora"):
        parse_config(_tree(adapters={"private": {"kind": "independent"}}))


def test_a_method_that_fixes_what_the_config_says_is_named() -> None:
    """As where a config of before says what `pfm` was."""
    with pytest.raises(ConfigError, match=r"taste is fixed by pfm_embedding, pfm_text"):
        parse_config(_tree(method="pfm", adapters={"private": {"kind": "taste"}}))


def test_custom_fixes_nothing_and_starts_from_the_same_settings() -> None:
    private = {"kind": "independent", "enabled": True}
    config = parse_config(_tree(method="custom", adapters={"private": private}))
    assert config.adapters.private.kind == "independent"
    ours, custom = (
        parse_config(_tree(method=method)).model_dump(exclude={"method"})
        for method in ("pfm", "custom")
    )
    assert custom == ours


@pytest.mark.parametrize("local", [{"shared_local_steps": 4}, {"private_local_steps": 0}])
def test_a_method_that_shares_nothing_takes_no_shared_steps(local: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"local_only trains no shared tensor.* remove"):
        parse_config(_tree(method="local_only", federation={"local": local}))


def test_a_method_that_shares_nothing_averages_nothing() -> None:
    averaging = {
        "local": {"shared_local_steps": 4, "private_local_steps": 4},
        "server": {"optimizer": "average"},
    }
    with pytest.raises(ConfigError, match="local_only trains no shared tensor"):
        parse_config(_tree(method="local_only", regime="fedavg", federation=averaging))
    assert parse_config(_tree(method="local_only", regime="fedsgd")).method is Method.LOCAL_ONLY


def test_an_unknown_method_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"method.*'central'.*'pfm_text'"):
        parse_config(_tree(method="fedit"))


def test_ours_has_a_private_lora_and_text_alone_has_no_item_parameters() -> None:
    ours = parse_config(_tree(method="pfm")).adapters.private
    assert (ours.kind, ours.rank, ours.alpha) == ("hyper_lora", 16, 16)
    embedding = parse_config(_tree(method="pfm_embedding")).adapters.private
    assert (embedding.kind, embedding.rank, embedding.alpha) == ("taste", 4, 8)
    text = parse_config(_tree(method="pfm_text"))
    assert (text.head.item_ids, text.head.item_bias) == ("none", False)


def test_a_regime_is_a_label_that_the_settings_must_fit() -> None:
    assert parse_config(_tree(regime="fedsgd")).regime is Regime.FEDSGD
    averaging = {
        "local": {"shared_local_steps": 4, "shared_optimizer": "adamw"},
        "server": {"optimizer": "average"},
    }
    assert parse_config(_tree(regime="fedavg", federation=averaging)).regime is Regime.FEDAVG
    with pytest.raises(ConfigError, match="regime: fedsgd"):
        parse_config(_tree(regime="fedsgd", federation=averaging))
    with pytest.raises(ConfigError, match="regime: fedavg"):
        parse_config(_tree(regime="fedavg"))


def test_likes_need_a_split_with_several_held_out_events() -> None:
    with pytest.raises(ConfigError, match="last_fraction"):
        parse_config(_tree(tasks=["next_item", "like"]))
    with pytest.raises(ConfigError, match="tasks must hold next_item"):
        parse_config(_tree(tasks=["like"], data={"split": "last_fraction"}))
