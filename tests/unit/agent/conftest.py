"""An agent on a tiny random model, with a history."""

from pathlib import Path

import pytest

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.base.processes import Processes
from pfm_llm.recommender import Recommender
from tests.support.agents import HISTORY, Clock, tiny_recommender
from tests.support.tiny import Tiny


@pytest.fixture(scope="session")
def model(
    tiny: Tiny, one_process: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Recommender:
    return tiny_recommender(tiny, one_process, tmp_path_factory.mktemp("run"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ids(model: Recommender) -> tuple[str, ...]:
    return model.catalogue.item_ids


@pytest.fixture
def agent(model: Recommender, tmp_path: Path, clock: Clock, ids: tuple[str, ...]) -> PersonalAgent:
    agent = PersonalAgent(model, tmp_path / "me", clock)
    agent.add_history([ids[item] for item in HISTORY])
    return agent
