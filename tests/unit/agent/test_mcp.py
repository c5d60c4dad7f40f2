"""An assistant finds its tools, and they do what the agent does."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import anyio
import pytest

pytest.importorskip("mcp", reason="the extra [agent] is not installed")

from mcp.client import Client
from starlette.testclient import TestClient

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.mcp_server import make_mcp
from pfm_llm.recommender import Recommender

Call = Callable[..., Any]


@pytest.fixture
def desk(agent: PersonalAgent, model: Recommender) -> Desk:
    return Desk(agent, ItemIndex(model.catalogue))


@pytest.fixture
def call(desk: Desk) -> Call:
    """Calls a tool as an assistant does."""

    def call(name: str, **arguments: Any) -> Any:
        async def ask() -> Any:
            async with Client(make_mcp(desk)) as client:
                return await client.call_tool(name, arguments)

        return anyio.run(ask)

    return call


def test_the_tools_say_what_they_do(desk: Desk) -> None:
    async def ask() -> Any:
        async with Client(make_mcp(desk)) as client:
            return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in anyio.run(ask)}
    assert tools.keys() == {"recommend", "find", "explain", "feedback"}
    assert all(tool.description for tool in tools.values())
    assert tools["feedback"].input_schema["required"] == ["item_id", "kind"]


def test_an_assistant_recommends_and_explains(call: Call, agent: PersonalAgent) -> None:
    found = call("recommend", k=3).structured_content["result"]
    assert found == json.loads(json.dumps([asdict(one) for one in agent.recommend(3)]))
    reasons = call("explain", item_id=found[0]["item_id"]).structured_content
    assert reasons["sentence"] == agent.explain(found[0]["item_id"]).sentence
    red = call("recommend", where={"title": "red"}).structured_content["result"]
    assert red
    assert all("red" in one["title"] for one in red)


def test_an_assistant_finds_a_title_and_says_what_the_person_said(
    call: Call, agent: PersonalAgent
) -> None:
    found = call("find", title="gren boat").structured_content["result"][0]["item_id"]
    assert call("feedback", item_id=found, kind="seen").structured_content == {"result": True}
    assert agent.history()[-1].item_id == found


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("explain", {"item_id": "nowhere"}, "no item 'nowhere'"),
        ("feedback", {"item_id": "nowhere", "kind": "like"}, "no item 'nowhere'"),
        ("feedback", {"item_id": "i0", "kind": "exclude"}, "exclude"),
        ("recommend", {"where": {"mood": "good"}}, "no field 'mood'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(
    call: Call, agent: PersonalAgent, name: str, arguments: dict[str, Any], message: str
) -> None:
    before = agent.known
    answer = call(name, **arguments)
    assert answer.is_error
    assert message in answer.content[0].text
    assert agent.known == before


def test_it_answers_beside_the_page_to_who_brings_the_token(desk: Desk) -> None:
    request = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    }
    headers = {"Accept": "application/json, text/event-stream", "Host": "127.0.0.1:80"}
    with TestClient(make_app(desk, "t" * 43, 80), "http://127.0.0.1:80", headers=headers) as client:
        assert client.post("/mcp", json=request).status_code == 401
        client.headers["Authorization"] = "Bearer " + "t" * 43
        answer = client.post("/mcp", json=request)
        assert answer.status_code == 200
        assert answer.json()["result"]["serverInfo"]["name"] == "pfm-agent"
