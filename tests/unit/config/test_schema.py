"""One strict YAML: what is unknown or impossible is named, what is valid comes back equal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pfm_llm.base.errors import ConfigError, PfmError
from pfm_llm.config.choices import Dtype, Schedule
from pfm_llm.config.model import PrivateAdapterConfig
from pfm_llm.config.schema import (
    ExperimentConfig,
    dump_config,
    load_config,
    parse_config,
    training_hash,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def private(**values: Any) -> dict[str, Any]:
    return {"name": "x", "method": "custom", "adapters": {"private": values}}


def test_a_name_is_enough_and_defaults_are_typed() -> None:
    config = parse_config({"name": "x"})
    assert config.backbone.dtype is Dtype.AUTO
    assert config.adapters.private.kind == "hyper_lora"
    assert config.evaluation.ks == (5, 10, 20)


def test_data_may_be_a_path_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\ndata: ratings.csv")
    changed = load_config(path, ["data.min_interactions=5"]).data
    assert (changed.source, changed.min_interactions) == ("ratings.csv", 5)
    assert load_config(path) == parse_config({"name": "mine", "data": {"source": "ratings.csv"}})
    assert load_config(path) == parse_config({"name": "mine", "data": "ratings.csv"})


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_config({"name": "x"}).seed = 1  # type: ignore[misc]


@given(
    st.builds(
        dict,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,9}", fullmatch=True),
        seed=st.integers(),
        window=st.fixed_dictionaries({"max_windows": st.none() | st.integers(1, 99)}),
        federation=st.fixed_dictionaries(
            {"server": st.fixed_dictionaries({"lr_lora": st.floats(1e-9, 1e9)})}
        ),
        evaluation=st.fixed_dictionaries({"ks": st.lists(st.integers(1, 50))}),
        backbone=st.fixed_dictionaries({"dtype": st.sampled_from(list(Dtype))}),
    )
)
def test_dump_and_load_give_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = parse_config(tree)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert training_hash(load_config(path)) == training_hash(config)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sede": 1}, r"unknown key sede; did you mean seed\?"),
        (
            {"federation": {"local": {"personalize_steps": 1}}},
            r"unknown key federation\.local\.personalize_steps; "
            r"did you mean federation\.local\.personalise_steps\?",
        ),
        ({"data": {"columns": {"zzz": 1}}}, r"unknown key data\.columns\.zzz; valid here: user, "),
        ({"data": {"split": "random"}}, r"data\.split: .*'leave_last_out'"),
        (
            {"data": {"users_per_client": 2}},
            r"hyper_lora reads one user's history.* set method: custom",
        ),
        ({"method": None}, r"method: .*'pfm'.*'custom'"),
        ({"window": {"items": 0}}, r"window\.items: .*greater than or equal to 1"),
        ({"adapters": {"private": {"weight": 1.6}}}, r"adapters\.private\.weight: .*1\.5"),
        ({"adapters": {"private": {"dropout": 1}}}, r"adapters\.private\.dropout: .*less than 1"),
        ({"federation": {"server": {"lr_head": -1}}}, r"lr_head: .*greater than 0"),
        ({"data": 3}, r"data: "),
        ({"name": ""}, r"name: "),
        ({"name": "../up"}, r"name: "),
        ({"name": "x.private"}, r"name ends in \.private, which is reserved"),
    ],
)
def test_what_is_wrong_is_named(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"name": "x", **tree})


def test_a_missing_name_is_named() -> None:
    with pytest.raises(ConfigError, match="name: Field required"):
        parse_config({})


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "sede": 1, "window": {"items": 0}}, origin="my.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "my.yaml:"
    assert len(lines) == 3
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, PfmError)


@pytest.mark.parametrize("schedule", [Schedule.JOINT, Schedule.PRIVATE_AFTER])
def test_shared_basis_needs_alternate(schedule: Schedule) -> None:
    tree = private(kind="shared_basis") | {"federation": {"local": {"schedule": schedule.value}}}
    with pytest.raises(ConfigError, match=r"shared_basis needs .*schedule: alternate"):
        parse_config(tree)
    parse_config(private(kind="shared_basis", enabled=False) | {"federation": tree["federation"]})


def test_shared_basis_needs_a_private_step() -> None:
    federation = {"local": {"schedule": "alternate", "private_local_steps": 0}}
    with pytest.raises(ConfigError, match="private_local_steps of at least 1"):
        parse_config(private(kind="shared_basis") | {"federation": federation})
    parse_config(private() | {"federation": federation})


@pytest.mark.parametrize(
    ("settings", "alpha", "scale"),
    [
        ({"kind": "hyper_lora"}, 16, 1.0),
        ({"kind": "hyper_lora", "rank": 32}, 16, 0.5),
        ({"kind": "hyper_lora", "alpha": 32}, 32, 2.0),
        ({"kind": "independent", "rank": 16}, 8, 0.5),
    ],
)
def test_a_rank_that_is_set_alone_leaves_alpha(
    settings: dict[str, Any], alpha: int, scale: float
) -> None:
    """As in PEFT; the defaults of a kind are no exception."""
    private = PrivateAdapterConfig.model_validate(settings)
    assert (private.alpha, private.scale) == (alpha, scale)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values, found NoneType"),
        ("- a\n- b", "expected keys and values, found list"),
        ("name: [", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_are_yaml_applied_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nfederation:\n  num_rounds: 7\n  cohort_size: 3\n")
    config = load_config(
        path,
        [
            "federation.num_rounds=9",
            "federation.num_rounds=11",
            "window.max_windows=null",
            "runtime.trackers=[tensorboard]",
            "data.source=a=b.csv",
            "method=shared_only",
        ],
    )
    assert (config.federation.num_rounds, config.federation.cohort_size) == (11, 3)
    assert config.window.max_windows is None
    assert config.runtime.trackers == ("tensorboard",)
    assert config.data.source == "a=b.csv"
    assert config.adapters.private.enabled is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"override 'seed': expected dotted\.key=value"),
        ("seed.deep=1", "setting seed.deep: seed is a value, not a group"),
        ("window.itms=1", r"did you mean window\.items\?"),
        ("seed=[", r"override 'seed=\[': '\[' is not valid YAML; put a text in quotation marks"),
        ("data.reading.separator=,", "',' is not valid YAML; put a text in quotation marks"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, "name: x\nseed: 1\n"), [override])


def test_training_hash_ignores_the_order_of_keys() -> None:
    one = parse_config({"name": "x", "seed": 3, "window": {"items": 4, "max_item_tokens": 5}})
    two = parse_config({"window": {"max_item_tokens": 5, "items": 4}, "seed": 3, "name": "x"})
    assert training_hash(one) == training_hash(two)


@pytest.mark.parametrize(
    "tree",
    [
        {"seed": 1},
        {"prompt": "next_item.v1"},
        {"data": {"repeats": "allow"}},
        {"backbone": {"dtype": "float32"}},
        {"window": {"items": 4}},
        {"adapters": {"shared": {"rank": 1}}},
        {"head": {"item_bias": False}},
        {"federation": {"server": {"momentum": 0.5}}},
    ],
    ids=lambda tree: next(iter(tree)),
)
def test_training_hash_sees_what_the_trained_tensors_depend_on(tree: dict[str, Any]) -> None:
    base = parse_config({"name": "x"})
    assert training_hash(parse_config({"name": "x", **tree})) != training_hash(base)


def test_training_hash_sees_passes_as_long_as_rounds_follow_from_them() -> None:
    def hash_of(**federation: Any) -> str:
        return training_hash(parse_config({"name": "x", "federation": federation}))

    assert hash_of(passes=2.0) != hash_of()
    assert hash_of(passes=2.0, num_rounds=9) == hash_of(num_rounds=9)


def test_training_hash_does_not_see_the_private_part_where_there_is_none() -> None:
    base = parse_config({"name": "x", "method": "shared_only"})
    other = {"name": "x", "method": "shared_only", "adapters": {"private": {"kind": "independent"}}}
    assert training_hash(parse_config(other)) == training_hash(base)


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "y"},
        {"evaluation": {"ks": [1]}},
        {"cache": {"max_gb": 0}},
        {"runtime": {"trackers": ["tensorboard"]}},
        {"output": {"checkpoint_every": 1}},
        {"adapters": {"private": {"weight": 0.5}}},
    ],
    ids=lambda tree: next(iter(tree)),
)
def test_training_hash_does_not_see_the_rest(tree: dict[str, Any]) -> None:
    base = parse_config({"name": "x"})
    assert training_hash(parse_config({"name": "x", **tree})) == training_hash(base)


def test_every_key_of_the_tree_is_strict() -> None:
    """Each nested section refuses an unknown key, so no typo anywhere passes silently."""

    def sections(model: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = [path]
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found += sections(field.annotation, (*path, name))
        return found

    paths = sections(ExperimentConfig)
    assert len(paths) > 12
    for path in paths:
        tree: dict[str, Any] = {"no_such_key": 1}
        for part in reversed(path):
            tree = {part: tree}
        dotted = r"\.".join([*path, "no_such_key"])
        with pytest.raises(ConfigError, match=f"unknown key {dotted}"):
            parse_config({"name": "x", **tree})


@pytest.mark.parametrize("setting", [{"read_rank": 5}, {"dropout": 0.5}])
@pytest.mark.parametrize(("method", "same"), [("pfm", False), ("shared_only", True)])
def test_training_hash_sees_a_taste_where_there_is_one(
    setting: dict[str, float], method: str, same: bool
) -> None:
    base = parse_config({"name": "x", "method": method})
    taste = {"adapters": {"private": {"taste": setting}}}
    other = parse_config({"name": "x", "method": method, **taste})
    assert (training_hash(other) == training_hash(base)) == same


def test_codes_have_settings_where_they_are_chosen_and_change_no_hash_where_not() -> None:
    plain = parse_config({"name": "x"})
    assert plain.head.codes is None
    assert "codes" not in plain.model_dump()["head"]
    assert training_hash(plain) == training_hash(parse_config({"name": "x", "head": {}}))
    chosen = parse_config({"name": "x", "head": {"item_ids": "codes"}})
    assert chosen.head.codes is not None
    assert chosen == parse_config(chosen.model_dump(mode="json"))
    other = {"item_ids": "codes", "codes": {"hash_size": 64}}
    assert training_hash(chosen) != training_hash(parse_config({"name": "x", "head": other}))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            {"item_ids": "codes", "codes": {"hash_books": 0, "text_books": 0}},
            r"head\.codes.*text_books and hash_books are both 0.*set one of them",
        ),
        ({"codes": {}}, "codes has no effect with item_ids: both; set item_ids: codes, or leave"),
        ({"item_ids": "codes", "codes": {"hash_books": 17}}, r"head\.codes\.hash_books"),
        ({"item_ids": "codes", "codes": {"hash_sise": 1}}, r"head\.codes\.hash_sise.*hash_size"),
    ],
)
def test_codes_that_cannot_be_are_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parse_config({"name": "x", "head": head})
