"""``federation.stages`` and ``federation.server.aggregator``: what is read and what is refused."""

from typing import Any

import pytest
import yaml

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import Aggregation
from pfm_llm.config.schema import dump_config, parse_config, training_hash


def federation(**settings: Any) -> dict[str, Any]:
    return {"name": "x", "federation": settings}


def test_a_list_of_stages_is_read_and_written_back() -> None:
    config = parse_config(federation(stages=[{"clip": {"norm": 1.5}}]))
    assert [stage.choice for stage in config.federation.stages] == [("clip", {"norm": 1.5})]
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_training_depends_on_stages_and_aggregator() -> None:
    trees = [
        {},
        {"stages": [{"clip": {"norm": 1}}]},
        {"stages": [{"clip": {"norm": 2}}]},
        {"server": {"aggregator": "median"}},
    ]
    assert len({training_hash(parse_config(federation(**tree))) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"clap": {"norm": 1}}], r"stages\.0: .*unknown stage 'clap'; known stages: clip"),
        (["clip"], r"such as \{clip: \{norm: 1\.0\}\}, not as 'clip'; known stages: clip"),
        ([{}], "one stage with its settings, this one holds 0"),
        ([{"clip": None}], "one stage with its settings, this one holds 0"),
        ([{"clip": {}}], r"stages\.0\.clip\.norm: Field required"),
        ([{"clip": {"norm": 0}}], r"stages\.0\.clip\.norm: .*greater than 0"),
        ([{"clip": {"norm": -1}}], r"stages\.0\.clip\.norm: .*greater than 0"),
        ([{"clip": {"norm": float("inf")}}], r"stages\.0\.clip\.norm: .*finite"),
        ([{"clip": {"nrom": 1}}], r"unknown key .*stages\.0\.clip\.nrom; did you mean .*\.norm\?"),
        ([{"clip": {"norm": 1}}] * 2, "stages: clip is listed more than once"),
    ],
)
def test_wrong_stages_are_named_with_the_remedy(stages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(federation(stages=stages))


def test_the_aggregator_is_the_mean_or_what_is_named() -> None:
    assert parse_config(federation()).federation.server.aggregator is Aggregation.MEAN
    named = parse_config(federation(server={"aggregator": "median"}))
    assert named.federation.server.aggregator is Aggregation.MEDIAN
    with pytest.raises(ConfigError, match=r"server\.aggregator: .*'mean' or 'median'"):
        parse_config(federation(server={"aggregator": "krum"}))


def test_a_median_takes_no_weights() -> None:
    weighted = {"aggregator": "median", "weighting": "num_examples"}
    with pytest.raises(ConfigError, match=r"median counts every client once; set .*uniform"):
        parse_config(federation(server=weighted))
