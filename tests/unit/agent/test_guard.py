"""Who gets in: the token, this host, pages of ours, and within bounds."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.guard import LARGEST, RateBound
from pfm_llm.recommender import Recommender

PORT, TOKEN = 8610, "t" * 43
HERE = f"http://127.0.0.1:{PORT}"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client(agent: PersonalAgent, model: Recommender) -> Iterator[TestClient]:
    app = make_app(Desk(agent, ItemIndex(model.catalogue)), TOKEN, PORT, RateBound(burst=1e9))
    with TestClient(app, HERE, follow_redirects=False) as client:
        yield client


@pytest.fixture
def browser(client: TestClient) -> TestClient:
    """A browser that has opened the address with the token."""
    assert client.get("/", params={"token": TOKEN}).status_code == 303
    client.headers["Origin"] = HERE
    return client


PATHS = ("/", "/history", "/memory/export", "/api/history", "/api/openapi.json", "/static/agent.js")


@pytest.mark.parametrize("path", [*PATHS, "/mcp", "/nowhere"])
def test_nothing_is_told_without_the_token(client: TestClient, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer " + "x" * 43}, {"Cookie": "pfm_agent_8610=x"}):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert "pfm agent" in answer.text
    assert client.get(path, params={"token": TOKEN[:-1]}).status_code == 401


def test_a_browser_brings_the_token_once(client: TestClient) -> None:
    answer = client.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert all(client.get(path).status_code == 200 for path in PATHS)


def test_a_program_brings_it_with_every_request(client: TestClient) -> None:
    assert all(client.get(path, headers=BEARER).status_code == 200 for path in PATHS)
    assert client.post("/api/undo", headers=BEARER).status_code == 200
    assert client.get("/api/history").status_code == 401


@pytest.mark.parametrize("host", ["agent.example", "127.0.0.1", "127.0.0.1:80", "", "[::1]:8610"])
def test_another_host_is_not_answered(client: TestClient, host: str) -> None:
    """A name that somebody lets point to 127.0.0.1 after their page has loaded."""
    assert client.get("/", headers={**BEARER, "Host": host}).status_code == 421
    assert client.get("/", headers={**BEARER, "Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9", ""])
def test_a_page_of_somebody_else_changes_and_reads_nothing(
    browser: TestClient, agent: PersonalAgent, origin: str
) -> None:
    before = agent.known
    for path in ("/undo", "/memory/delete", "/api/undo"):
        for headers in ({}, BEARER):
            answer = browser.post(path, headers={"Origin": origin, **headers})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
    assert browser.get("/api/history", headers={"Origin": origin}).status_code == 403
    assert agent.known == before


def test_a_cookie_alone_changes_nothing(browser: TestClient, agent: PersonalAgent) -> None:
    before = agent.known
    del browser.headers["Origin"]
    assert browser.post("/undo").status_code == 403
    assert agent.known == before
    assert browser.get("/history").status_code == 200


def test_no_other_origin_is_let_in_by_a_preflight(client: TestClient) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/api/undo", headers=headers)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_has_a_bound(browser: TestClient, agent: PersonalAgent) -> None:
    before = agent.known
    assert browser.post("/begin", content=b"x" * (LARGEST + 1)).status_code == 413
    assert browser.post("/begin", content=iter([b"x"])).status_code == 411
    assert browser.post("/begin", headers={"Content-Length": "-1"}).status_code == 413
    export = agent.folder.parent / "mine.json"
    agent.export(export)
    content = export.read_bytes() + b" " * LARGEST
    kind = {"Content-Type": "application/json"}
    assert browser.post("/api/import", content=content, headers=kind).status_code == 204
    assert browser.post("/api/history", content=content, headers=kind).status_code == 413
    assert agent.known == before


def test_requests_have_a_rate(agent: PersonalAgent, model: Recommender) -> None:
    now = [0.0]
    rate = RateBound(per_second=2, burst=3, clock=lambda: now[0])
    app = make_app(Desk(agent, ItemIndex(model.catalogue)), TOKEN, PORT, rate)
    with TestClient(app, HERE, headers=BEARER) as client:

        def codes(number: int) -> list[int]:
            return [client.get("/api/settings").status_code for _ in range(number)]

        assert codes(5) == [200, 200, 200, 429, 429]
        now[0] += 1
        assert codes(3) == [200, 200, 429]
        now[0] += 100
        assert codes(4) == [200, 200, 200, 429]
        refused = client.get("/api/settings", headers={"Authorization": ""})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_every_answer_forbids_what_is_from_elsewhere(browser: TestClient, path: str) -> None:
    headers = browser.get(path).headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "same-origin"


def test_there_are_no_web_sockets(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/"):
        pass
    assert refused.value.code == 1008
