"""An agent fetches adapters, keeps what serves its user's past no worse, and goes back."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.agent import agent as agents
from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.sync import LEAST, Check, check
from pfm_llm.base.errors import ConfigError, CorruptFileError, DataError, HubError
from pfm_llm.recommender import Recommender
from pfm_llm.runs.experiment import run_experiment
from tests.support.tiny import Tiny

SETTINGS: dict[str, Any] = {"method": "pfm", "tasks": ["next_item"], "evaluation__baselines": []}


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters after two and after thirty rounds."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        run_experiment(tiny.config(folder / str(rounds), federation__num_rounds=rounds, **SETTINGS))
        / "shared_adapter"
        for rounds in (2, 30)
    ]


@pytest.fixture(scope="module")
def models(tiny: Tiny, adapters: list[Path]) -> list[Recommender]:
    catalogue = str(tiny.items)
    return [
        Recommender.from_pretrained(folder, catalogue=catalogue, backbone=str(tiny.model))
        for folder in adapters
    ]


@pytest.fixture
def agent(models: list[Recommender], tmp_path: Path) -> PersonalAgent:
    agent = PersonalAgent(models[0], tmp_path / "me")
    agent.add_history(models[0].catalogue.item_ids[3:15])
    return agent


def _shown(agent: PersonalAgent) -> list[tuple[str, float]]:
    return [(one.item_id, round(one.own, 4)) for one in agent.recommend(8)]


def test_an_adapter_is_asked_for_each_newest_event_after_those_before(
    models: list[Recommender], agent: PersonalAgent
) -> None:
    events = agent.known.counted
    found = check(*models, events)
    assert found.num_events == len(events) - 1
    assert found.difference is not None
    assert found.error is not None
    back = check(models[1], models[0], events)
    assert back.difference == pytest.approx(-found.difference)
    assert check(models[0], models[0], events) == Check(len(events) - 1, 0.0, 0.0)
    assert check(*models, events[: LEAST - 1]) == Check(0, None, None)


@pytest.mark.parametrize(
    ("difference", "error", "kept"),
    [(0.2, 0.1, True), (-0.05, 0.1, True), (-0.2, 0.1, False), (None, None, True)],
)
def test_an_adapter_is_no_worse_within_one_standard_error(
    difference: float | None, error: float | None, kept: bool
) -> None:
    assert Check(9, difference, error).is_no_worse is kept


def test_a_synced_adapter_serves_at_once_offline_and_until_it_is_rolled_back(
    agent: PersonalAgent,
    adapters: list[Path],
    models: list[Recommender],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Check, "is_no_worse", True)
    first = _shown(agent)
    copies = [Path(shutil.copytree(one, tmp_path / f"copy{n}")) for n, one in enumerate(adapters)]
    for copy in copies:
        agent.sync(str(copy), backbone=str(tiny.model))
    second = _shown(agent)
    assert second != first
    for copy in copies:
        shutil.rmtree(copy)  # what serves is in the user's folder
    bases = {"backbone": str(tiny.model)}
    again = PersonalAgent.open(agent.folder, str(tiny.items), **bases)
    assert _shown(again) == second
    assert again.roll_back(**bases)
    assert _shown(again) == first
    assert not again.roll_back(**bases)
    entries = agent.ledger()
    assert [entry["used"] for entry in entries] == [True, True]
    assert [entry["round"] for entry in entries] == [2, 30]
    assert all(entry["bytes_received"] > 0 == entry["bytes_sent"] for entry in entries)


def test_an_adapter_that_serves_the_past_worse_is_not_kept(
    agent: PersonalAgent, adapters: list[Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _shown(agent)
    monkeypatch.setattr(agents, "check", lambda *_: Check(11, -0.5, 0.1))
    assert not agent.sync(str(adapters[1]), backbone=str(tiny.model)).is_no_worse
    assert _shown(agent) == before
    assert not (agent.folder / "adapters").exists()
    assert agent.ledger()[0]["used"] is False


def test_an_adapter_that_cannot_be_had_changes_nothing(
    agent: PersonalAgent, adapters: list[Path], tiny: Tiny, tmp_path: Path
) -> None:
    before = _shown(agent)
    broken = Path(shutil.copytree(adapters[1], tmp_path / "broken"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CorruptFileError):
        agent.sync(str(broken), backbone=str(tiny.model))
    with pytest.raises(HubError):
        agent.sync("nobody/nothing")
    assert _shown(agent) == before
    assert agent.ledger() == []
    with pytest.raises(DataError, match="no adapter yet"):
        PersonalAgent.open(agent.folder, str(tiny.items))


def test_an_adapter_with_a_private_part_of_steps_is_refused(
    agent: PersonalAgent, tiny: Tiny, tmp_path: Path
) -> None:
    settings = SETTINGS | {"method": "fedrep", "federation__num_rounds": 1}
    other = run_experiment(tiny.config(tmp_path / "steps", **settings)) / "shared_adapter"
    with pytest.raises(ConfigError, match="trained by steps"):
        agent.sync(str(other), backbone=str(tiny.model))


def test_forgetting_everything_reaches_the_adapters(
    agent: PersonalAgent, adapters: list[Path], tiny: Tiny
) -> None:
    agent.sync(str(adapters[0]), backbone=str(tiny.model))
    agent.forget()
    assert list(agent.folder.iterdir()) == []
