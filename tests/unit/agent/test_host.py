"""Many users on one host: served together, and kept apart."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.host.accounts import USERS, Account, Accounts
from pfm_llm.agent.host.batcher import Batcher
from pfm_llm.agent.host.serving import hosted
from pfm_llm.agent.host.users import Users
from pfm_llm.base.errors import AccessError, CorruptFileError, DataError
from pfm_llm.recommender import Recommender
from tests.support.agents import history_of


@pytest.fixture
def batcher(model: Recommender) -> Iterator[Batcher]:
    batcher = Batcher(model.serving.scores)
    yield batcher
    batcher.close()


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "host")


@pytest.fixture
def users(accounts: Accounts, model: Recommender, batcher: Batcher) -> Users:
    return Users(accounts, hosted(model, batcher))


def _added(accounts: Accounts, *names: str) -> list[Account]:
    found = [accounts.find(accounts.add(name)) for name in names]
    return [one for one in found if one is not None]


def test_no_users_history_or_private_part_reaches_anothers_list(
    users: Users, accounts: Accounts, model: Recommender, batcher: Batcher, tmp_path: Path
) -> None:
    """Each of many who ask at the same time gets what an agent on their own machine shows."""
    them = _added(accounts, *(f"user {number}" for number in range(24)))
    expected = []
    for number, account in enumerate(them):
        alone = PersonalAgent(model, tmp_path / f"alone{number}")
        alone.add_history(history_of(model, number))
        with users.using(account) as agent:
            agent.add_history(history_of(model, number))
        expected.append(alone.recommend(30))
    assert len({tuple(one.item_id for one in shown) for shown in expected}) == len(them)

    def asks(account: Account) -> list[tuple[str, int]]:
        with users.using(account) as agent:
            return [(one.item_id, one.place_shared) for one in agent.recommend(30)]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(asks, them))
            for own, shown in zip(expected, found, strict=True):
                assert shown == [(one.item_id, one.place_shared) for one in own]
    assert batcher.counts.failed == batcher.counts.refused == 0
    assert batcher.counts.passes < batcher.counts.users


def test_the_agents_used_least_recently_are_closed_and_opened_again(
    accounts: Accounts, model: Recommender
) -> None:
    users = Users(accounts, model, most_open=2)
    them = _added(accounts, "a", "b", "c")
    agents = []
    for account in them:
        with users.using(account) as agent:
            agents.append(agent)
    assert users.num_open == 2
    for number, is_kept in ((2, True), (0, False), (1, False)):
        with users.using(them[number]) as agent:
            assert (agent is agents[number]) == is_kept
            assert agent.folder == agents[number].folder


def test_an_agent_in_use_is_not_closed_and_nothing_it_keeps_is_lost(
    accounts: Accounts, model: Recommender
) -> None:
    users = Users(accounts, model, most_open=0)
    mine, other = _added(accounts, "a", "b")
    ids = model.catalogue.item_ids
    with users.using(mine) as agent:
        with users.using(other):
            assert users.num_open == 2
        assert users.num_open == 1
        agent.add_history(ids[:2])
    assert users.num_open == 0
    with users.using(mine) as again:
        assert again is not agent
        assert [event.item_id for event in again.history()] == list(ids[:2])


def test_one_user_has_one_agent_at_a_time(accounts: Accounts, model: Recommender) -> None:
    """Eviction at every step, and threads of one user: never two in the same folder."""
    users, guard = Users(accounts, model, most_open=0), threading.Lock()
    them, ids = _added(accounts, "a", "b", "c"), model.catalogue.item_ids
    inside: set[Path] = set()

    def adds(number: int) -> None:
        with users.using(them[number % 3]) as agent:
            with guard:
                assert agent.folder not in inside
                inside.add(agent.folder)
            known = len(agent.history())
            agent.add_history([ids[number // 3]])
            assert len(agent.history()) == known + 1
            with guard:
                inside.remove(agent.folder)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(adds, range(60)))
    for account in them:
        with users.using(account) as agent:
            assert {event.item_id for event in agent.history()} == set(ids[:20])
            assert len(agent.history()) == 20


def test_a_second_process_waits_for_the_folder(
    accounts: Accounts, model: Recommender, tmp_path: Path
) -> None:
    """Another list of the same file stands for another process: it shares no lock in memory."""
    (mine,) = _added(accounts, "a")
    order: list[str] = []

    def elsewhere() -> None:
        with Users(Accounts(tmp_path / "host"), model).using(mine) as agent:
            order.append(f"second with {len(agent.history())}")

    with ThreadPoolExecutor(1) as pool:
        with Users(accounts, model).using(mine) as agent:
            waiting = pool.submit(elsewhere)
            assert not _is_done_soon(waiting)
            agent.add_history(model.catalogue.item_ids[:3])
            order.append("first")
        waiting.result(60)
    assert order == ["first", "second with 3"]


def _is_done_soon(waiting: "Future[None]") -> bool:
    return bool(wait([waiting], 0.3).done)


def test_a_token_opens_its_own_folder_alone(accounts: Accounts, tmp_path: Path) -> None:
    one, other = (accounts.add(name) for name in ("a", "../b"))
    folders = [account.folder for token in (one, other) if (account := accounts.find(token))]
    assert len(set(folders)) == 2
    assert all(folder.parent == tmp_path / "host" for folder in folders)
    keys = list(accounts.by_key())
    for wrong in ("", "a", "../b", one[:-1], one + "x", str(folders[0]), folders[0].name, *keys):
        assert accounts.find(wrong) is None


def test_a_token_is_kept_nowhere(users: Users, accounts: Accounts, tmp_path: Path) -> None:
    token = accounts.add("a")
    account = accounts.find(token)
    assert account is not None
    with users.using(account) as agent:
        agent.pause()
    kept = [path.read_text() for path in (tmp_path / "host").rglob("*") if path.is_file()]
    assert kept
    assert not any(token in text for text in kept)


def test_a_removed_user_is_gone_with_all_that_was_kept(
    users: Users, accounts: Accounts, model: Recommender, tmp_path: Path
) -> None:
    token = accounts.add("a")
    mine = accounts.find(token)
    (other,) = _added(accounts, "b")
    assert mine is not None
    with users.using(mine) as agent:
        agent.add_history(history_of(model, 1))
    Accounts(tmp_path / "host").remove("a")  # an operator, in another process
    assert accounts.find(token) is None
    with pytest.raises(AccessError), users.using(mine):
        pass
    assert users.num_open == 0
    assert not [path for path in (tmp_path / "host").rglob("*") if mine.folder.name in str(path)]
    with users.using(other) as agent:
        assert agent.history() == ()
    with pytest.raises(DataError, match="no user 'a'"):
        accounts.remove("a")
    (again,) = _added(accounts, "a")
    with users.using(again) as agent:
        assert agent.history() == ()
    with pytest.raises(DataError, match="already"):
        accounts.add("a")
    with pytest.raises(DataError, match="name"):
        accounts.add(" ")


def test_who_is_removed_while_they_are_served_leaves_nothing_behind(
    users: Users, accounts: Accounts, model: Recommender
) -> None:
    (mine,) = _added(accounts, "a")
    with ThreadPoolExecutor(2) as pool:
        with users.using(mine) as agent:
            removing = pool.submit(accounts.remove, "a")
            assert not _is_done_soon(removing)
            agent.add_history(history_of(model, 1))  # their request goes on to its end
        removing.result(60)
    assert not mine.folder.exists()
    with pytest.raises(AccessError), users.using(mine):
        pass
    assert not mine.folder.exists()


@pytest.mark.parametrize("folder", ["../../etc", "", "ab", "g" * 32, "0" * 31 + "/"])
def test_a_list_of_users_that_names_another_place_is_refused(
    accounts: Accounts, tmp_path: Path, folder: str
) -> None:
    token = accounts.add("a")
    path = tmp_path / "host" / USERS
    path.write_text(f'{{"{"0" * 64}": {{"name": "a", "folder": "{folder}"}}}}')
    with pytest.raises(CorruptFileError, match="no list of users"):
        accounts.find(token)


def test_a_list_of_users_that_is_damaged_is_refused(accounts: Accounts, tmp_path: Path) -> None:
    token = accounts.add("a")
    good = (tmp_path / "host" / USERS).read_text()
    for wrong in ("[]", good.replace('"name": "a"', '"name": 1'), good.replace('": {', 'x": {')):
        (tmp_path / "host" / USERS).write_text(wrong)
        with pytest.raises(CorruptFileError, match="no list of users"):
            accounts.find(token)
