"""Tests of pfm_llm.data.partition."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.partition import partition


def people(user_ids: Sequence[str]) -> Interactions:
    """Users without any events: a partition looks at no event."""
    return Interactions(
        catalogue=Catalogue(("a",), {"title": ("a",)}),
        user_ids=tuple(user_ids),
        offsets=np.zeros(len(user_ids) + 1, dtype=np.int64),
        items=np.zeros(0, dtype=np.int32),
        timestamps=None,
        ratings=None,
        user_fields={},
    )


def client_ids(user_ids: Sequence[str]) -> list[str]:
    return [client.client_id for client in partition(people(user_ids), 1, seed=0)]


@given(st.lists(st.text(max_size=100), unique=True, max_size=20))
def test_one_client_per_user_with_safe_unique_names(user_ids: list[str]) -> None:
    """Any unique ids become unique file names, also where a file system ignores case."""
    clients = partition(people(user_ids), 1, seed=0)
    assert [client.users for client in clients] == [(user,) for user in range(len(user_ids))]
    names = [client.client_id for client in clients]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"user-[A-Za-z0-9._-]+", name) for name in names)
    assert all(len(name) <= 100 for name in names)


def test_safe_ids_are_kept_and_others_are_hashed() -> None:
    kept, slash, underscore, empty = client_ids(["A-1.b_2", "a/b", "a_b", ""])
    assert kept == "user-A-1.b_2"
    assert re.fullmatch(r"user-a_b-[0-9a-f]{12}", slash)
    assert underscore == "user-a_b"
    assert re.fullmatch(r"user--[0-9a-f]{12}", empty)


def test_long_ids_are_cut_and_hashed() -> None:
    first, second = client_ids(["x" * 300, "x" * 301])
    assert first != second
    assert re.fullmatch(r"user-x{80}-[0-9a-f]{12}", first)


def test_ids_that_differ_in_case_only_are_hashed() -> None:
    upper, lower, other = client_ids(["Ann", "ann", "bob"])
    assert re.fullmatch(r"user-Ann-[0-9a-f]{12}", upper)
    assert re.fullmatch(r"user-ann-[0-9a-f]{12}", lower)
    assert other == "user-bob"


def test_id_that_imitates_a_hashed_one_is_an_error() -> None:
    """Two users must never share a client's private folder, not even on purpose."""
    (hashed,) = client_ids(["a/b"])
    with pytest.raises(DataError, match="would both be client"):
        client_ids(["a/b", hashed.removeprefix("user-")])


@given(st.integers(0, 40), st.integers(2, 9), st.integers(0, 5))
def test_silos_hold_every_user_once(num_users: int, users_per_client: int, seed: int) -> None:
    """All silos are full but the last, which holds what is left."""
    clients = partition(people([str(user) for user in range(num_users)]), users_per_client, seed)
    held = [user for client in clients for user in client.users]
    assert sorted(held) == list(range(num_users))
    assert len(clients) == -(-num_users // users_per_client)  # rounded up
    assert all(len(client.users) == users_per_client for client in clients[:-1])
    assert all(list(client.users) == sorted(client.users) for client in clients)
    assert [client.client_id for client in clients] == [
        f"silo-{i:04d}" for i in range(len(clients))
    ]


def test_silos_depend_on_the_seed_alone() -> None:
    everybody = people([str(user) for user in range(50)])
    assert partition(everybody, 10, seed=1) == partition(everybody, 10, seed=1)
    assert partition(everybody, 10, seed=1) != partition(everybody, 10, seed=2)


def test_silo_holds_plain_ints() -> None:
    """Integers of numpy would not survive JSON."""
    (client,) = partition(people(["a", "b"]), 5, seed=0)
    assert [type(user) for user in client.users] == [int, int]


def test_fewer_than_one_user_per_client_is_an_error() -> None:
    with pytest.raises(ConfigError, match="users_per_client"):
        partition(people(["a"]), 0, seed=0)
