"""Cohorts: a function of (seed, round), without repeats, everybody equally often."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError
from pfm_llm.server.participation import select_cohort, simulated_dropouts


def _clients(count: int) -> list[str]:
    return [f"u{index}" for index in range(count)]


@st.composite
def _sizes(draw: st.DrawFn) -> tuple[int, int]:
    num_clients = draw(st.integers(1, 23))
    return num_clients, draw(st.integers(1, num_clients))


@settings(deadline=None)
@given(sizes=_sizes(), seed=st.integers(0, 3), rounds=st.integers(1, 60))
def test_no_client_is_ever_two_rounds_ahead_of_another(
    sizes: tuple[int, int], seed: int, rounds: int
) -> None:
    clients = _clients(sizes[0])
    counts = Counter(dict.fromkeys(clients, 0))
    for round_number in range(1, rounds + 1):
        cohort = select_cohort(clients, sizes[1], seed, round_number)
        assert len(cohort) == len(set(cohort)) == sizes[1]
        counts.update(cohort)
    assert set(counts) == set(clients)
    assert max(counts.values()) - min(counts.values()) <= 1


@settings(deadline=None)
@given(sizes=_sizes(), round_number=st.integers(1, 1000), data=st.data())
def test_order_of_the_clients_does_not_matter(
    sizes: tuple[int, int], round_number: int, data: st.DataObject
) -> None:
    clients = _clients(sizes[0])
    shuffled = data.draw(st.permutations(clients))
    expected = select_cohort(clients, sizes[1], 7, round_number)
    assert select_cohort(shuffled, sizes[1], 7, round_number) == expected


def test_a_round_is_known_without_those_before() -> None:
    clients = _clients(11)
    forwards = [select_cohort(clients, 4, 5, number) for number in range(1, 40)]
    backwards = [select_cohort(clients, 4, 5, number) for number in range(39, 0, -1)]
    assert forwards == backwards[::-1]


def test_other_seed_other_cohort() -> None:
    clients = _clients(100)
    cohorts = {select_cohort(clients, 10, seed, 1) for seed in range(20)}
    assert len(cohorts) == 20


def test_passes_are_shuffled_anew() -> None:
    # 6 clients in cohorts of 3: rounds 1-2 are the first pass, rounds 3-4 the second, ...
    clients = _clients(6)
    firsts = {frozenset(select_cohort(clients, 3, 0, number)) for number in range(1, 80, 2)}
    assert len(firsts) > 10  # of 20 possible


def test_every_client_is_equally_likely_after_a_boundary() -> None:
    # 5 clients in cohorts of 3: round 2 spans two passes. Each client is in it with
    # probability 3/5: of 3000 seeds 1800, standard deviation sqrt(3000 * .6 * .4) = 27.
    clients = _clients(5)
    counts = Counter(c for seed in range(3000) for c in select_cohort(clients, 3, seed, 2))
    assert all(abs(counts[client] - 1800) < 5 * 27 for client in clients)


def test_whole_population_takes_part_when_the_cohort_is_everyone() -> None:
    clients = _clients(4)
    assert all(set(select_cohort(clients, 4, 0, number)) == set(clients) for number in (1, 2, 9))
    assert select_cohort(["only"], 1, 0, 3) == ("only",)


@pytest.mark.parametrize(
    ("clients", "cohort_size", "round_number", "message"),
    [
        (["a", "b"], 3, 1, "cohort_size is 3 but there are 2 clients"),
        (["a", "b"], 0, 1, "cohort_size is 0"),
        ([], 1, 1, "there are 0 clients"),
        (["a", "b", "a"], 1, 1, "client 'a' is listed twice"),
        (["a", "b"], 1, 0, "round 0 does not exist"),
    ],
)
def test_impossible_cohorts_are_config_errors(
    clients: list[str], cohort_size: int, round_number: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        select_cohort(clients, cohort_size, 0, round_number)


def test_simulated_dropouts_are_that_many_of_the_cohort_and_others_in_each_round() -> None:
    cohort = _clients(64)
    found = [simulated_dropouts(cohort, 0.3, 0, number) for number in range(1, 6)]
    assert [len(gone) for gone in found] == [19] * 5
    assert all(gone <= set(cohort) for gone in found)
    assert len(set(found)) == 5
    assert simulated_dropouts(cohort, 0.3, 0, 3) == found[2]
    assert simulated_dropouts(cohort, 0.0, 0, 1) == frozenset()
