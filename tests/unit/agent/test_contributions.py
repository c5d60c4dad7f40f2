"""What users of a host let a federation learn from, as the data of a node."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.host.accounts import Accounts
from pfm_llm.agent.host.contributions import Written, write_contributions
from pfm_llm.base.errors import DataError
from pfm_llm.recommender import Recommender
from pfm_llm.runs.run import load_corpus
from tests.support.agents import history_of
from tests.support.tiny import Tiny


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "host")


def _join(
    accounts: Accounts, model: Recommender, name: str, items: Sequence[str], rating: float | None
) -> PersonalAgent:
    account = accounts.find(accounts.add(name))
    assert account is not None
    agent = PersonalAgent(model, account.folder)
    times = [1000.5 + number for number in range(len(items))]
    agent.add_history(items, times, None if rating is None else [rating] * len(items))
    agent.contribute(True)
    return agent


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_node_reads_what_those_contribute_who_want_to(
    accounts: Accounts, model: Recommender, tiny: Tiny, tmp_path: Path
) -> None:
    agents = [
        _join(accounts, model, f"user {number}", history_of(model, number), 3.0)
        for number in range(5)
    ]
    agents[1].contribute(False)
    left_out = agents[2].history()[1].item_id
    agents[2].exclude(left_out)
    agents[3].forget()
    path = tmp_path / "node.csv"
    written = write_contributions(accounts, path)
    expected = {
        agent.folder.name: [one.item_id for one in agent.known.counted]
        for agent in (agents[0], agents[2], agents[4])
    }
    assert left_out not in expected[agents[2].folder.name]
    assert written == Written(5, 3, sum(map(len, expected.values())))
    assert path.stat().st_mode & 0o077 == 0
    assert "user 0" not in path.read_text()

    data = {"source": str(path), "items": str(tiny.items), "min_interactions": 1}
    corpus = load_corpus(tiny.config(tmp_path / "runs", method="pfm", data=data))
    ids = corpus.interactions.catalogue.item_ids
    found = {
        user: [ids[item] for item in corpus.interactions.history(number)]
        for number, user in enumerate(corpus.interactions.user_ids)
    }
    assert found == expected
    assert corpus.interactions.ratings is not None


def test_ratings_are_written_where_every_event_has_one(
    accounts: Accounts, model: Recommender, tmp_path: Path
) -> None:
    path = tmp_path / "node.csv"
    _join(accounts, model, "one", history_of(model, 1), 4.0)
    write_contributions(accounts, path)
    assert {row["rating"] for row in _rows(path)} == {"4.0"}
    _join(accounts, model, "another", history_of(model, 2), None)
    write_contributions(accounts, path)
    assert "rating" not in _rows(path)[0]


def test_where_nobody_contributes_nothing_is_written(
    accounts: Accounts, model: Recommender, tmp_path: Path
) -> None:
    path = tmp_path / "node.csv"
    path.write_text("what was there")
    _join(accounts, model, "one", history_of(model, 1), None).contribute(False)
    with pytest.raises(DataError, match="no user of this host"):
        write_contributions(accounts, path)
    assert path.read_text() == "what was there"


def test_who_was_removed_contributes_nothing(
    accounts: Accounts, model: Recommender, tmp_path: Path
) -> None:
    path = tmp_path / "node.csv"
    for name in ("one", "another"):
        _join(accounts, model, name, history_of(model, 1), None)
    accounts.remove("one")
    assert write_contributions(accounts, path).num_users == 1
