"""Settings that follow from the number of clients: which values, and what is kept."""

from typing import Any

import pytest

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.config.schema import ExperimentConfig, parse_config
from pfm_llm.config.settings import leaves
from pfm_llm.config.settle import FOLLOWING, known, settle, settle_like


def settled(num_clients: int, **tree: Any) -> ExperimentConfig:
    return settle(parse_config({"name": "x", **tree}), num_clients)


def values(config: ExperimentConfig) -> dict[str, object]:
    found = leaves(config.model_dump(mode="json"))
    return {key.split(".")[-1]: found[key] for key in FOLLOWING}


@pytest.mark.parametrize(
    ("num_clients", "num_rounds"),
    [
        (943, 400),  # 3.4 x 943 / 8 = 400.8
        (11869, 5040),  # 5044.3
        (2401, 1020),  # 1020.4
        (2000, 850),  # exactly
        (100, 40),  # 42.5
        (1, 10),  # 3.4, and a cohort of one
    ],
)
def test_rounds_are_so_many_passes_over_the_clients_in_tens(
    num_clients: int, num_rounds: int
) -> None:
    assert settled(num_clients).federation.num_rounds == num_rounds


def test_passes_and_cohort_change_the_rounds_and_given_rounds_overrule_them() -> None:
    assert settled(400, federation={"passes": 1.0}).federation.num_rounds == 50
    assert settled(400, federation={"passes": 1.0, "cohort_size": 4}).federation.num_rounds == 100
    assert settled(400, federation={"num_rounds": 7}).federation.num_rounds == 7


def test_passes_are_read_as_they_are_written() -> None:
    """In binary .7 x 100 is 69.99…, and 60 rounds would come of it."""
    assert settled(100, federation={"passes": 0.7, "cohort_size": 1}).federation.num_rounds == 70


@pytest.mark.parametrize(
    ("num_rounds", "expected"),
    [
        (1, (0, 1, 1)),
        (10, (1, 2, 1)),
        (120, (10, 30, 20)),
        (400, (10, 100, 50)),
        (5040, (10, 100, 50)),
    ],
)
def test_what_follows_from_the_rounds_suits_few_and_many(
    num_rounds: int, expected: tuple[int, int, int]
) -> None:
    found = values(settled(943, federation={"num_rounds": num_rounds}))
    assert (found["warmup_rounds"], found["every"], found["checkpoint_every"]) == expected


@pytest.mark.parametrize(("num_clients", "cohort_size"), [(1, 1), (5, 5), (8, 8), (943, 8)])
def test_a_cohort_is_at_most_all_clients(num_clients: int, cohort_size: int) -> None:
    assert settled(num_clients).federation.cohort_size == cohort_size


def test_what_the_config_says_is_kept() -> None:
    given = {
        "federation": {"num_rounds": 33, "cohort_size": 3, "server": {"warmup_rounds": 0}},
        "evaluation": {"every": 0},
        "output": {"checkpoint_every": 4},
    }
    found = values(settled(2000, **given))
    assert found == {
        "cohort_size": 3,
        "num_rounds": 33,
        "warmup_rounds": 0,
        "every": 0,
        "checkpoint_every": 4,
    }


def test_a_settled_config_is_whole_and_settling_it_again_changes_nothing() -> None:
    config = settled(943)
    assert None not in values(config).values()
    assert settle(config, 17) == config


def test_settings_without_a_relation_to_the_data_stay() -> None:
    before = leaves(parse_config({"name": "x"}).model_dump(mode="json"))
    after = leaves(settled(943).model_dump(mode="json"))
    assert {key for key in before if before[key] != after[key]} == set(FOLLOWING)


@pytest.mark.parametrize(("every", "commits"), [(100, 50), (25, 25), (60, 30), (7, 7), (0, 50)])
def test_commits_fall_on_the_rounds_that_are_pushed(every: int, commits: int) -> None:
    push = {"repo": "me/films", "every": every}
    assert settled(943, push_to_hub=push).output.checkpoint_every == commits


def test_given_commits_that_miss_a_push_are_refused_before_anything_is_settled() -> None:
    push = {"repo": "me/films", "every": 25}
    with pytest.raises(ConfigError, match=r"25 is not a multiple of output\.checkpoint_every"):
        parse_config({"name": "x", "push_to_hub": push, "output": {"checkpoint_every": 10}})


def test_without_a_client_there_is_nothing_to_settle() -> None:
    with pytest.raises(DataError, match="no user has two events to train on"):
        settled(0)


def test_what_is_open_can_be_as_another_settled_config_says() -> None:
    config = parse_config({"name": "x", "federation": {"cohort_size": 4}})
    found = settle_like(config, settled(2000))
    assert (found.federation.num_rounds, found.federation.cohort_size) == (850, 4)


def test_a_value_that_is_still_open_is_named() -> None:
    assert known(0) == 0
    with pytest.raises(ConfigError, match=r"federation\.num_rounds.* has no value yet"):
        known(parse_config({"name": "x"}).federation.num_rounds)
