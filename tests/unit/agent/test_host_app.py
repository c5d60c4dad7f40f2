"""Many users over HTTP: each reaches their own agent alone, within bounds, and is counted."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [agent] is not installed")

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.host.service import Bounds, HostService
from pfm_llm.agent.ranking import Ranking
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.guard import LARGEST
from pfm_llm.agent.web.host_app import make_host_app
from pfm_llm.recommender import Recommender
from pfm_llm.recommender.serving import Served
from tests.support.agents import history_of

OPERATOR = "o" * 43
LABELS = ("route", "method", "status")


@pytest.fixture
def service(model: Recommender, tmp_path: Path) -> Iterator[HostService]:
    service = HostService(tmp_path / "host", model, Bounds(per_second=1e9, burst=1e9, of_one=1000))
    yield service
    service.close()


@pytest.fixture
def client(service: HostService) -> Iterator[TestClient]:
    with TestClient(make_host_app(service, OPERATOR), "http://host.example") as client:
        yield client


def _with(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _met(client: TestClient, token: str, item_ids: Sequence[str]) -> None:
    answer = client.post("/api/history", json={"item_ids": item_ids}, headers=_with(token))
    assert answer.status_code == 204


def _metrics(client: TestClient) -> dict[tuple[str, ...], float]:
    """Each value by its name, and by the route, method and status that it is of."""
    answer = client.get("/metrics", headers=_with(OPERATOR))
    assert answer.status_code == 200
    return {
        (sample.name, *(sample.labels[one] for one in LABELS if one in sample.labels)): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class _Asked:
    """What some users get over HTTP, and what they get alone."""

    def __init__(
        self, client: TestClient, tokens: Sequence[str], model: Recommender, folder: Path
    ) -> None:
        self._client, self.tokens = client, tokens
        self.alone = [PersonalAgent(model, folder / str(number)) for number in range(len(tokens))]
        for number, (token, agent) in enumerate(zip(tokens, self.alone, strict=True)):
            history = history_of(model, number)
            _met(client, token, history)
            agent.add_history(history)
        self._expected = [[asdict(one) for one in agent.recommend(30)] for agent in self.alone]

    def differing(self, rounds: int = 2) -> int:
        """How many answers are not those of the user's own agent alone; all ask at one time."""
        asked = [number for number in range(len(self.tokens)) for _ in range(rounds)]
        with ThreadPoolExecutor(len(self.tokens)) as pool:
            found = list(pool.map(self._ask, asked))
        return sum(
            not _is_same(self._expected[number], shown)
            for number, shown in zip(asked, found, strict=True)
        )

    def _ask(self, number: int) -> list[dict[str, Any]]:
        headers = _with(self.tokens[number])
        answer = self._client.get("/api/recommendations", params={"k": 30}, headers=headers)
        assert answer.status_code == 200
        found: list[dict[str, Any]] = answer.json()
        return found


def _is_same(expected: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> bool:
    """The same items at the same places; ``own`` to what the size of a pass changes of it."""
    plain = [[{**one, "own": None} for one in items] for items in (expected, shown)]
    own = [[one["own"] for one in items] for items in (expected, shown)]
    return plain[0] == plain[1] and np.allclose(*own, rtol=0, atol=1e-5)


@pytest.fixture
def asked(client: TestClient, service: HostService, model: Recommender, tmp_path: Path) -> _Asked:
    tokens = [service.accounts.add(f"user {number}") for number in range(16)]
    return _Asked(client, tokens, model, tmp_path / "alone")


def test_every_answer_is_that_of_the_users_own_agent(
    asked: _Asked, client: TestClient, service: HostService
) -> None:
    assert asked.differing() == 0
    counts = service.batcher.counts
    assert counts.passes < counts.users  # some were served together
    assert _metrics(client)["pfm_ranked_total",] == counts.users


@pytest.mark.parametrize("what", ["private", "kept"])
def test_what_changes_places_in_a_pass_is_seen(
    asked: _Asked, service: HostService, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The test above fails where a private part, or what is kept, reaches another user's row."""
    right = service.batcher._scores

    def shuffled(users: Sequence[Served], weight: float | None) -> np.ndarray:
        moved = [{what: getattr(users[row - 1], what)} for row in range(len(users))]
        pairs = zip(users, moved, strict=True)
        return right([dataclasses.replace(user, **own) for user, own in pairs], weight)

    monkeypatch.setattr(service.batcher, "_scores", shuffled)
    assert asked.differing() > 0


def test_a_history_that_another_agent_has_read_is_seen(
    asked: _Asked, service: HostService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails also where what is kept of one history serves another."""
    first: dict[str, Any] = {}
    right = Ranking._read
    monkeypatch.setattr(
        Ranking, "_read", lambda self, events: first.setdefault("", right(self, events))
    )
    assert asked.differing() > 0


def test_what_is_kept_of_one_user_reaches_nobody_else(
    asked: _Asked, client: TestClient, model: Recommender
) -> None:
    one, other = asked.tokens[:2]
    first = client.get("/api/recommendations", headers=_with(one)).json()[0]["item_id"]
    before = client.get("/api/export", headers=_with(other)).content
    said = {"kind": "less_like_this"}
    client.post(f"/api/items/{first}/feedback", json=said, headers=_with(one))
    client.patch("/api/settings", json={"weight": 0.1}, headers=_with(one))
    assert client.get("/api/export", headers=_with(other)).content == before
    assert client.delete("/api/memory", headers=_with(one)).json() == 4
    assert client.get("/api/export", headers=_with(other)).content == before
    assert client.get("/api/history", headers=_with(one)).json() == []
    for agent, token in zip(asked.alone[1:], asked.tokens[1:], strict=True):
        events = client.get("/api/history", headers=_with(token)).json()
        assert [one["item_id"] for one in events] == [one.item_id for one in agent.history()]


PATHS = ("/", "/api/history", "/api/openapi.json", "/metrics", "/mcp", "/nowhere", "/api/../x")


@pytest.mark.parametrize("path", PATHS)
def test_whatever_is_wrong_with_a_token_the_answer_is_the_same(
    client: TestClient, service: HostService, path: str
) -> None:
    token = service.accounts.add("a")
    account = service.accounts.find(token)
    assert account is not None
    wrong = ["", "x", token[:-1], token + "x", "a", account.key, account.folder.name, "../a", "é"]
    headers: list[dict[str, Any]] = [{"Authorization": f"Bearer {one}".encode()} for one in wrong]
    headers += [{}, {"Authorization": token}, {"Authorization": f"Basic {token}"}]
    headers += [{"Cookie": f"token={token}"}]
    answers = [client.get(path, headers=one) for one in headers]
    answers.append(client.get(path, params={"token": token}))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert len({tuple(answer.headers.items()) for answer in answers}) == 1
    if path != "/metrics":
        assert client.get(path, headers=_with(OPERATOR)).content == answers[0].content


@pytest.mark.parametrize(
    "path",
    [
        "/api/history/../../{folder}/history",
        "/api/%2e%2e/{folder}/history",
        "/api/{folder}/history",
        "/api/history/..%2f..%2f{folder}%2factions.json",
        "/api/items/..%2F{folder}/explanation",
        "/api/items/%2e%2e%2f{folder}%2Fexport/explanation",
        "/api/items/{key}/explanation",
        "/{folder}/actions.json",
        "/api/export/{folder}",
        "/users.json",
        "/..%2fusers.json",
        "//api/history/{name}",
        "/api/items/x%00{folder}/explanation",
    ],
)
def test_no_path_leads_to_another_user(client: TestClient, service: HostService, path: str) -> None:
    mine, theirs = service.accounts.add("a"), service.accounts.add("b")
    account = service.accounts.find(theirs)
    assert account is not None
    _met(client, theirs, ["i7"])
    at = path.format(folder=account.folder.name, key=account.key, name="b")
    for method in ("GET", "DELETE", "PUT", "POST"):
        answer = client.request(method, at, headers=_with(mine), json={"counts": False})
        assert answer.status_code in (400, 404, 405, 422)
        assert "i7" not in answer.text
    assert len(client.get("/api/history", headers=_with(theirs)).json()) == 1


def test_ids_of_others_in_queries_bodies_and_headers_are_nothing(
    client: TestClient, service: HostService
) -> None:
    mine, theirs = service.accounts.add("a"), service.accounts.add("b")
    account = service.accounts.find(theirs)
    assert account is not None
    _met(client, theirs, ["i7"])
    headers = {**_with(mine), "X-User": "b", "X-Forwarded-User": account.key, "Cookie": "user=b"}
    for value in ("b", account.key, account.folder.name, theirs):
        params = {"user": value, "token": value, "account": value, "folder": value}
        assert client.get("/api/history", params=params, headers=headers).json() == []
        body = {"item_ids": ["i1"], "user": value, "account": value, "folder": value}
        client.post("/api/history", params=params, json=body, headers=headers)
        content = client.get("/api/export", headers=headers).json() | {"folder": value}
        client.post("/api/import", json=content, headers=headers)
        client.delete("/api/memory", params=params, headers=headers)
    (event,) = client.get("/api/history", headers=_with(theirs)).json()
    assert event["item_id"] == "i7"


def test_no_answer_names_a_folder_or_a_user(
    client: TestClient, service: HostService, tmp_path: Path
) -> None:
    token = service.accounts.add("Alice")
    account = service.accounts.find(token)
    assert account is not None
    _met(client, token, ["i1", "i2"])
    answers = [client.post("/api/import", json={"format": "other"}, headers=_with(token))]
    assert answers[0].status_code == 400
    assert "is no export of an agent" in answers[0].text
    (account.folder / "actions.json").write_text("damaged")
    answers += [client.get(f"/api/{at}", headers=_with(token)) for at in ("history", "beliefs")]
    assert [answer.status_code for answer in answers[1:]] == [500, 500]
    answers.append(client.get("/metrics", headers=_with(OPERATOR)))
    for answer in answers:
        for secret in (str(tmp_path), account.folder.name, account.key, token, "Alice"):
            assert secret not in answer.text


def test_a_removed_users_token_opens_nothing(client: TestClient, service: HostService) -> None:
    token = service.accounts.add("a")
    _met(client, token, ["i1"])
    service.accounts.remove("a")
    answer = client.get("/api/history", headers=_with(token))
    assert answer.status_code == 401
    assert answer.content == client.get("/api/history", headers=_with("x")).content
    again = service.accounts.add("a")
    assert client.get("/api/history", headers=_with(again)).json() == []


def test_who_is_removed_after_the_guard_let_them_in_gets_the_same_answer(
    client: TestClient, service: HostService, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = service.accounts.add("a")
    account = service.accounts.find(token)
    service.accounts.remove("a")
    refused = client.get("/api/history", headers=_with(token))
    monkeypatch.setattr(service.accounts, "find", lambda _: account)
    answer = client.get("/api/history", headers=_with(token))
    assert (answer.status_code, answer.content) == (401, refused.content)


class _Slow:
    """Ranks when it is told to."""

    def __init__(self, scores: Callable[..., np.ndarray]) -> None:
        self._scores = scores
        self.go, self.begun = threading.Event(), threading.Event()

    def __call__(self, users: Sequence[Served], weight: float | None) -> np.ndarray:
        self.begun.set()
        assert self.go.wait(60)
        return self._scores(users, weight)


def _slow(service: HostService, monkeypatch: pytest.MonkeyPatch) -> _Slow:
    slow = _Slow(service.batcher._scores)
    monkeypatch.setattr(service.batcher, "_scores", slow)
    return slow


@pytest.mark.parametrize(
    ("bounds", "statuses"),
    [
        (Bounds(batch=1, most_waiting=2), [200, 200, 200, 503]),
        (Bounds(batch=9, most_waiting=1), [200, 200, 503, 503]),
    ],
)
def test_who_comes_when_too_many_wait_is_told_to_come_again(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounds: Bounds,
    statuses: list[int],
) -> None:  # fmt: skip
    """Those beyond what is worked on at a time, and those beyond the queue of the passes."""
    service = HostService(tmp_path / "host", model, bounds)
    tokens = [service.accounts.add(str(number)) for number in range(len(statuses))]
    with TestClient(make_host_app(service, OPERATOR)) as client, ThreadPoolExecutor(4) as pool:
        for (
            token
        ) in tokens:  # what is the same for every weight is read, so that one ranking is left
            _met(client, token, ["i1"])
            client.get("/api/recommendations", headers=_with(token))
        slow = _slow(service, monkeypatch)
        asked = []
        for number, token in enumerate(tokens):
            asked.append(pool.submit(client.get, "/api/recommendations", headers=_with(token)))
            assert slow.begun.wait(60)
            while not asked[-1].done() and service.batcher.num_waiting < number:
                time.sleep(0.01)
        late = client.get("/api/recommendations", headers=_with(tokens[-1]))
        assert late.status_code == 503
        assert late.headers["retry-after"] == "1"
        assert "ask again" in late.text
        slow.go.set()
        assert [one.result(60).status_code for one in asked] == statuses


def test_one_user_cannot_take_all_places(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = HostService(tmp_path / "host", model, Bounds(of_one=2))
    mine, other = service.accounts.add("a"), service.accounts.add("b")
    slow = _slow(service, monkeypatch)
    with TestClient(make_host_app(service, OPERATOR)) as client, ThreadPoolExecutor(4) as pool:
        path = "/api/recommendations"
        asked = [pool.submit(client.get, path, headers=_with(mine)) for _ in range(2)]
        while _metrics(client)["pfm_running",] < 2:
            time.sleep(0.01)
        refused = client.get("/api/history", headers=_with(mine))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.get("/api/history", headers=_with(other)).json() == []
        slow.go.set()
        assert len([one.result(60) for one in asked]) == 2
        assert client.get("/api/history", headers=_with(mine)).json() == []


def test_each_user_has_a_rate_of_their_own(model: Recommender, tmp_path: Path) -> None:
    service = HostService(tmp_path / "host", model, Bounds(per_second=1e-9, burst=3))
    mine, other = service.accounts.add("a"), service.accounts.add("b")
    with TestClient(make_host_app(service, OPERATOR)) as client:

        def codes(token: str, number: int) -> list[int]:
            asked = [client.get("/api/settings", headers=_with(token)) for _ in range(number)]
            return [answer.status_code for answer in asked]

        assert codes(mine, 5) == [200, 200, 200, 429, 429]
        assert codes(other, 2) == [200, 200]
        assert codes("x", 9) == [401] * 9


def test_a_body_has_a_bound(client: TestClient, service: HostService) -> None:
    token = service.accounts.add("a")
    large = b"x" * (LARGEST + 1)
    assert client.post("/api/history", content=large, headers=_with(token)).status_code == 413
    assert client.post("/api/history", content=large, headers=_with("x")).status_code == 401


def test_a_host_that_stops_says_so_and_takes_no_more(
    client: TestClient, service: HostService
) -> None:
    token = service.accounts.add("a")
    assert client.get("/health").text == "ok\n"
    service.is_stopping = True
    for path, headers in (("/health", {}), ("/api/history", _with(token))):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "stopping" in answer.text


def test_what_an_operator_sees(client: TestClient, service: HostService) -> None:
    token = service.accounts.add("Alice")
    _met(client, token, ["i1", "i2"])
    assert client.get("/api/recommendations", headers=_with(token)).status_code == 200
    client.get("/api/items/secret-item/explanation", headers=_with(token))
    client.get("/api/nowhere", headers=_with(token))
    client.get("/api/history", headers=_with("x"))
    client.request("STRANGE", "/api/history", headers=_with("x"))
    found = _metrics(client)
    assert found["pfm_requests_total", "/api/recommendations", "GET", "200"] == 1
    assert found["pfm_requests_total", "/api/items/{item_id}/explanation", "GET", "400"] == 1
    assert found["pfm_requests_total", "none", "GET", "404"] == 1
    assert found["pfm_requests_total", "none", "GET", "401"] == 1
    assert found["pfm_requests_total", "none", "none", "401"] == 1
    assert found["pfm_request_seconds_count", "/api/recommendations"] == 1
    assert found["pfm_users",] == found["pfm_open_agents",] == 1
    assert found["pfm_running",] == found["pfm_waiting",] == found["pfm_refused_total",] == 0
    assert found["pfm_ranked_total",] == service.batcher.counts.users > 0
    assert client.get("/metrics", headers=_with(token)).status_code == 401
    text = client.get("/metrics", headers=_with(OPERATOR)).text
    assert not [secret for secret in ("Alice", "secret-item", "STRANGE") if secret in text]


def test_the_api_is_that_of_one_persons_agent(
    agent: PersonalAgent, client: TestClient, service: HostService
) -> None:
    app = make_app(Desk(agent, ItemIndex(service.catalogue)), OPERATOR, 8610)
    with TestClient(app, "http://127.0.0.1:8610") as alone:
        one = alone.get("/api/openapi.json", headers=_with(OPERATOR)).json()
    many = client.get("/api/openapi.json", headers=_with(service.accounts.add("a"))).json()
    assert many["paths"] == one["paths"]
    assert many["components"] == one["components"]
