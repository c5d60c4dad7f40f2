"""A resolved config shown: every setting once, its value, and where the value is from."""

from pathlib import Path

import pytest
import yaml

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.schema import load_config
from pfm_llm.config.settings import leaves
from pfm_llm.config.show import describe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "my.yaml"
    file.write_text(
        "name: shop\ndata: {source: shop.csv, columns: {user: buyer}}\nwindow: {items: 16}\n"
    )
    return file


def line(text: str, name: str) -> str:
    found, *_ = [
        each for each in text.splitlines() if each.strip().startswith(f"{name}: ")
    ]  # the outermost comes first
    return " ".join(found.split())


def test_each_line_says_where_its_value_is_from(path: Path) -> None:
    text = describe(path, ["seed=3", "federation.server={lr_head: 0.5}"])
    assert line(text, "name") == "name: shop # my.yaml"
    assert line(text, "user") == "user: buyer # my.yaml"
    assert line(text, "min_interactions") == "min_interactions: 3 # default"
    assert line(text, "seed") == "seed: 3 # --set"
    assert line(text, "lr_head") == "lr_head: 0.5 # --set"
    assert line(text, "kind") == "kind: hyper_lora # method pfm"
    assert line(text, "ks") == "ks: [5, 10, 20] # default"
    assert line(text, "num_rounds") == "num_rounds: null # follows from the number of clients"


def test_what_is_shown_reads_back_to_the_same_config(path: Path, tmp_path: Path) -> None:
    overrides = ["method=fedrep", "push_to_hub.repo=me/shop"]
    (tmp_path / "shown.yaml").write_text(describe(path, overrides))
    assert load_config(tmp_path / "shown.yaml") == load_config(path, overrides)


def test_every_setting_is_shown(path: Path) -> None:
    expected = load_config(path).model_dump(mode="json")
    assert leaves(yaml.safe_load(describe(path))) == leaves(expected)


def test_a_value_that_is_given_does_not_follow(path: Path) -> None:
    text = describe(path, ["federation.num_rounds=20"])
    assert line(text, "num_rounds") == "num_rounds: 20 # --set"
    assert line(text, "warmup_rounds") == "warmup_rounds: null # follows from the number of clients"


def test_a_shipped_config_is_found_by_its_name() -> None:
    assert line(describe("quickstart"), "every") == "every: 0 # quickstart.yaml"


def test_what_is_wrong_is_named_as_when_it_is_loaded(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean window\.items\?"):
        describe(path, ["window.itms=3"])
    with pytest.raises(ConfigError, match="',' is not valid YAML"):
        describe(path, ["data.reading.separator=,"])
