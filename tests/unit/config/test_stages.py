"""``federation.stages`` and ``federation.server.aggregator``: what is read and what is refused."""

from typing import Any

import pytest
import yaml

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.choices import Aggregation
from pfm_llm.config.schema import dump_config, parse_config, training_hash
from pfm_llm.config.settle import settle


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
    with pytest.raises(ConfigError, match=r"server\.aggregator: .*'mean', 'median', .* or 'fool"):
        parse_config(federation(server={"aggregator": "krum"}))


@pytest.mark.parametrize("share", [-0.1, 0.5, 1])
def test_the_share_of_a_trimmed_mean_leaves_something(share: float) -> None:
    trimmed = {"aggregator": "trimmed_mean", "trim_share": share}
    with pytest.raises(ConfigError, match=r"federation\.server\.trim_share: "):
        parse_config(federation(server=trimmed))


def test_the_share_of_a_trimmed_mean_is_dumped_and_hashed_where_it_is_another() -> None:
    plain = parse_config(federation(server={"aggregator": "trimmed_mean"}))
    other = parse_config(federation(server={"aggregator": "trimmed_mean", "trim_share": 0.3}))
    assert "trim_share" not in dump_config(plain)
    assert parse_config(yaml.safe_load(dump_config(other))) == other
    assert training_hash(other) != training_hash(plain)


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "foolsgold"])
def test_what_orders_values_takes_no_weights(aggregator: str) -> None:
    weighted = {"aggregator": aggregator, "weighting": "num_examples"}
    with pytest.raises(ConfigError, match=rf"{aggregator} counts every client once; set .*uniform"):
        parse_config(federation(server=weighted))


CLIP = [{"clip": {"norm": 1.0}}]


def test_masks_are_read_written_back_and_off_by_default() -> None:
    plain, masked = (parse_config(federation(stages=CLIP, masks=value)) for value in (False, True))
    assert plain == parse_config(federation(stages=CLIP))
    assert "masks" not in dump_config(plain)
    assert masked == parse_config(federation(stages=CLIP, masks={}))
    assert parse_config(yaml.safe_load(dump_config(masked))) == masked
    given = parse_config(federation(stages=CLIP, masks={"neighbours": 20})).federation.masks
    assert given is not None
    assert (given.neighbours, given.max_examples) == (20, 10_000)
    assert training_hash(masked) != training_hash(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, r"from a bound of each update; add a stage.*\{clip: \{norm: 1\.0\}\}"),
        (
            {"server": {"aggregator": "median"}},
            "a sum alone, and the median needs single updates; set .*aggregator: mean",
        ),
        ({"transport": "bfloat16"}, r"words of 32 bits; set federation\.transport: float32"),
        ({"cohort_size": 2}, "at least 3 clients in a cohort: .* raise federation.cohort_size"),
        ({"cohort_size": 1}, "at least 3 clients in a cohort"),
        ({"simulated_dropouts": 0.34}, "at most a third drops out; lower simulated_dropouts"),
        ({"masks": {"neighbours": 7}}, r"masks\.neighbours: .*greater than or equal to 8"),
        ({"masks": {"max_examples": 0}}, r"masks\.max_examples: .*greater than or equal to 1"),
        (
            {"masks": {"max_examples": 2**30}, "cohort_size": 64},
            "overflow; set masks.max_examples to at most 33554431",
        ),
        (
            {"stages": [{"clip": {"norm": 1e9}}]},
            r"round to steps of about 3\.7 with .*norm 1e\+09; set a norm near the median norm",
        ),
        ({"stages": [{"clip": {"norm": 1e-30}}]}, "set a norm near the median norm"),
    ],
)
def test_what_cannot_work_under_masks_is_refused_with_the_reason(
    settings: dict[str, Any], message: str
) -> None:
    tree = {"masks": True, "stages": CLIP, "cohort_size": 8} | settings
    with pytest.raises(ConfigError, match=message):
        parse_config(federation(**tree))
    del tree["masks"]
    if "masks" not in settings:
        parse_config(federation(**tree))  # each is fine in the clear


def test_a_cohort_that_turns_out_too_small_for_masks_is_refused() -> None:
    config = parse_config(federation(masks=True, stages=CLIP))
    assert settle(config, 3).federation.cohort_size == 3
    with pytest.raises(ConfigError, match="at least 3 clients in a cohort"):
        settle(config, 2)


def test_a_method_that_sends_nothing_has_nothing_to_mask() -> None:
    with pytest.raises(ConfigError, match="method: local_only sends no update to mask"):
        parse_config({**federation(masks=True, stages=CLIP), "method": "local_only"})
