"""Many users on one host: served together, and kept apart."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.host.batcher import Batcher
from pfm_llm.agent.host.serving import hosted
from pfm_llm.agent.host.users import USERS, Users
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.recommender import Recommender


@pytest.fixture
def batcher(model: Recommender) -> Iterator[Batcher]:
    batcher = Batcher(model.serving.scores)
    yield batcher
    batcher.close()


@pytest.fixture
def users(model: Recommender, batcher: Batcher, tmp_path: Path) -> Users:
    return Users(tmp_path / "host", hosted(model, batcher))


def _history(model: Recommender, number: int) -> list[str]:
    ids = model.catalogue.item_ids
    generator = np.random.default_rng(number)
    return [ids[item] for item in generator.choice(len(ids), 3 + number % 5, replace=False)]


def test_no_users_history_or_private_part_reaches_anothers_list(
    users: Users, model: Recommender, batcher: Batcher, tmp_path: Path
) -> None:
    """Each of many who ask at the same time gets what an agent on their own machine shows."""
    tokens = [users.add(f"user {number}") for number in range(24)]
    expected = []
    for number, token in enumerate(tokens):
        alone = PersonalAgent(model, tmp_path / f"alone{number}")
        for agent in (alone, users.agent(token)):
            assert agent is not None
            agent.add_history(_history(model, number))
        expected.append(alone.recommend(30))
    assert len({tuple(one.item_id for one in shown) for shown in expected}) == len(tokens)

    def asks(token: str) -> list[tuple[str, int]]:
        agent = users.agent(token)
        assert agent is not None
        return [(one.item_id, one.place_shared) for one in agent.recommend(30)]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(asks, tokens))
            for own, shown in zip(expected, found, strict=True):
                assert shown == [(one.item_id, one.place_shared) for one in own]
    assert batcher.counts.failed == batcher.counts.refused == 0
    assert batcher.counts.passes < batcher.counts.users


def test_the_agents_used_least_recently_are_closed_and_opened_again(
    model: Recommender, tmp_path: Path
) -> None:
    users = Users(tmp_path / "host", model, most_open=2)
    tokens = [users.add(str(number)) for number in range(3)]
    agents = [users.agent(token) for token in tokens]
    assert users.num_open == 2
    assert users.agent(tokens[2]) is agents[2]
    again = users.agent(tokens[0])
    assert again is not agents[0]
    assert agents[0] is not None
    assert again is not None
    assert again.folder == agents[0].folder
    assert users.agent(tokens[1]) is not agents[1]


def test_a_token_opens_its_own_folder_alone(users: Users, tmp_path: Path) -> None:
    one, other = (users.add(name) for name in ("a", "../b"))
    folders = [agent.folder for token in (one, other) if (agent := users.agent(token))]
    assert len(set(folders)) == 2
    assert all(folder.parent == tmp_path / "host" for folder in folders)
    for wrong in ("", "a", "../b", one[:-1], one + "x", str(folders[0]), folders[0].name):
        assert users.agent(wrong) is None


def test_a_token_is_kept_nowhere(users: Users, tmp_path: Path) -> None:
    token = users.add("a")
    kept = [path.read_text() for path in (tmp_path / "host").rglob("*") if path.is_file()]
    assert kept
    assert not any(token in text for text in kept)


def test_a_removed_user_is_gone_with_all_that_was_kept(
    users: Users, model: Recommender, tmp_path: Path
) -> None:
    token = users.add("a")
    agent = users.agent(token)
    assert agent is not None
    agent.add_history(_history(model, 1))
    users.remove("a")
    assert users.agent(token) is None
    assert not any((tmp_path / "host").rglob("actions.json"))
    with pytest.raises(DataError, match="no user 'a'"):
        users.remove("a")
    again = users.agent(users.add("a"))
    assert again is not None
    assert again.history() == ()
    with pytest.raises(DataError, match="already"):
        users.add("a")


@pytest.mark.parametrize("folder", ["../../etc", "", "ab", "g" * 32, "0" * 31 + "/"])
def test_a_list_of_users_that_names_another_place_is_refused(
    users: Users, tmp_path: Path, folder: str
) -> None:
    token = users.add("a")
    path = tmp_path / "host" / USERS
    path.write_text(f'{{"x": {{"name": "a", "folder": "{folder}"}}}}')
    with pytest.raises(CorruptFileError, match="no list of users"):
        users.agent(token)
