"""The HTTP API says what the agent says, and does what it does."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")

from starlette.testclient import TestClient

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.guard import RateBound
from pfm_llm.recommender import Recommender

TOKEN = "t" * 43


@pytest.fixture
def client(agent: PersonalAgent, model: Recommender) -> Iterator[TestClient]:
    app = make_app(Desk(agent, ItemIndex(model.catalogue)), TOKEN, 80, RateBound(burst=1e9))
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "127.0.0.1:80"}
    with TestClient(app, "http://127.0.0.1:80/api", headers=headers) as client:
        yield client


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_recommendations_are_those_of_the_agent(client: TestClient, agent: PersonalAgent) -> None:
    found = client.get("recommendations", params={"k": 4}).json()
    assert found == _plain([asdict(one) for one in agent.recommend(4)])
    shared = client.get("recommendations", params={"weight": 0}).json()
    assert [one["item_id"] for one in shared] == [one.item_id for one in agent.recommend(weight=0)]
    red = client.get("recommendations", params={"where": "title:RED"}).json()
    assert red
    assert all("red" in one["title"] for one in red)


def test_feedback_is_taken_in_and_taken_back(client: TestClient, agent: PersonalAgent) -> None:
    first = agent.recommend(1)[0].item_id
    answer = client.post(f"items/{first}/feedback", json={"kind": "less_like_this"})
    assert answer.json() == {"kept": True}
    assert agent.known.less == (first,)
    assert client.post("undo").json()["kind"] == "less_like_this"
    assert agent.known.less == ()
    client.patch("settings", json={"paused": True})
    answer = client.post(f"items/{first}/feedback", json={"kind": "like"})
    assert answer.json() == {"kept": False}


def test_reasons_are_those_of_the_agent(client: TestClient, agent: PersonalAgent) -> None:
    first = agent.recommend(1)[0].item_id
    found = client.get(f"items/{first}/explanation").json()
    assert found == _plain(asdict(agent.explain(first)))


def test_items_are_found_and_added(client: TestClient, agent: PersonalAgent) -> None:
    (found, *_) = client.get("items", params={"query": "gren boat"}).json()
    assert found["title"] == "green boat"
    assert client.post("history", json={"item_ids": [found["item_id"]]}).status_code == 204
    assert client.get("history").json()[-1]["item_id"] == found["item_id"]
    assert agent.history()[-1].item_id == found["item_id"]


def test_events_count_or_do_not_or_are_gone(client: TestClient, agent: PersonalAgent) -> None:
    first = agent.history()[0].item_id
    for counts in (False, True):
        answer = client.put(f"history/{first}/counts", json={"counts": counts})
        assert answer.status_code == 204
        assert agent.history()[0].counts is counts
    assert client.delete(f"history/{first}").status_code == 204
    assert first not in {event.item_id for event in agent.history()}
    assert client.delete(f"history/{first}").status_code == 400


def test_settings_change_alone(client: TestClient, agent: PersonalAgent) -> None:
    client.patch("settings", json={"weight": 0.5, "strength": 0.25})
    assert (agent.settings.weight, agent.settings.strength) == (0.5, 0.25)
    assert client.patch("settings", json={"contributes": True}).json()["contributes"]
    assert client.patch("settings", json={"paused": False}).json()["weight"] == 0.5
    assert client.patch("settings", json={"weight": None}).json()["weight"] is None
    assert client.get("settings").json()["strength"] == 0.25
    assert client.patch("settings", json={"weight": 9}).status_code == 422


def test_all_leaves_all_goes_and_all_comes_back(client: TestClient, agent: PersonalAgent) -> None:
    before = agent.known
    content = client.get("export").json()
    assert client.delete("memory").json() == len(before.events)
    assert agent.history() == ()
    assert client.post("import", json=content).status_code == 204
    assert agent.known == before
    assert client.post("import", json={"format": "other"}).status_code == 400
    assert agent.known == before


def test_beliefs_are_those_of_the_agent(client: TestClient, agent: PersonalAgent) -> None:
    assert client.get("beliefs").json() == _plain(asdict(agent.beliefs()))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "items/nowhere/feedback", {"kind": "like"}, 400, "no item 'nowhere'"),
        ("POST", "items/i0/feedback", {"kind": "exclude"}, 400, "no feedback 'exclude'"),
        ("POST", "items/i0/feedback", {"kind": "adore"}, 422, "adore"),
        ("GET", "items/nowhere/explanation", None, 400, "no item 'nowhere'"),
        ("GET", "recommendations?where=mood:good", None, 400, "no field 'mood'"),
        ("GET", "recommendations?k=0", None, 422, "greater than"),
        ("PUT", "history/nowhere/counts", {"counts": False}, 400, "not in the history"),
        ("POST", "history", {"item_ids": ["nowhere"]}, 400, "no item 'nowhere'"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(
    client: TestClient, method: str, path: str, body: Any, status: int, message: str
) -> None:
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    assert message in answer.text


def test_the_api_is_described(client: TestClient) -> None:
    paths = client.get("openapi.json").json()["paths"]
    assert {"/api/recommendations", "/api/items/{item_id}/feedback", "/api/memory"} < paths.keys()
    assert all(path.startswith("/api/") for path in paths)
    methods = [one for path in paths.values() for one in path.values()]
    assert all(one.get("description") for one in methods)
