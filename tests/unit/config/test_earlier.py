"""Trees of earlier versions: what became of their settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.earlier import CONSTANTS, from_earlier, load_saved
from pfm_llm.config.schema import ExperimentConfig, dump_config, parse_config
from pfm_llm.config.settings import leaves
from pfm_llm.config.settle import settle
from pfm_llm.config.text import set_setting

RESULTS = Path(__file__).parents[3] / "results"


def earlier_tree() -> dict[str, Any]:
    tree = settle(parse_config({"name": "x", "method": "custom"}), 943).model_dump(mode="json")
    tree["method"] = None
    for key, value in CONSTANTS.items():
        set_setting(tree, key, value)
    return tree


def test_no_method_became_custom_and_constants_are_left_out() -> None:
    tree = earlier_tree()
    assert parse_config(from_earlier(tree)) == settle(
        parse_config({"name": "x", "method": "custom"}), 943
    )
    assert tree == earlier_tree()  # the argument stays


def test_a_run_of_an_earlier_version_is_read_with_the_settings_of_its_time(tmp_path: Path) -> None:
    config = parse_config({"name": "x"})
    tree = yaml.safe_load(dump_config(config))
    del tree["head"]["item_dropout"]  # was left out where it was off
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_saved(path).head.item_dropout == 0
    path.write_text(dump_config(config))
    assert load_saved(path) == config


def test_another_value_than_the_constant_is_refused() -> None:
    tree = earlier_tree()
    tree["federation"]["server"]["eps"] = 1e-3
    with pytest.raises(ConfigError, match=r"unknown key federation\.server\.eps"):
        parse_config(from_earlier(tree))


def test_a_constant_is_no_setting_any_more() -> None:
    assert not CONSTANTS.keys() & leaves(ExperimentConfig(name="x").model_dump(mode="json")).keys()


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/*/*.json")), ids=lambda path: "/".join(path.parts[-3:])
)
def test_the_config_of_every_committed_result_can_be_read(path: Path) -> None:
    tree = json.loads(path.read_text())["config"]
    found = leaves(parse_config(from_earlier(tree)).model_dump(mode="json"))
    kept = leaves(tree)
    kept["method"] = kept["method"] or "custom"
    assert {key: kept[key] for key in kept.keys() & found.keys()} == {
        key: found[key] for key in kept.keys() & found.keys()
    }
