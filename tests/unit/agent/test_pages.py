"""The page without a script: what it shows, and that its forms do what they say."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")

from starlette.testclient import TestClient

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.guard import RateBound
from pfm_llm.data.interactions import Catalogue
from pfm_llm.recommender import Recommender

HERE, TOKEN = "http://127.0.0.1:8610", "t" * 43


def _browser(agent: PersonalAgent, catalogue: Catalogue) -> TestClient:
    app = make_app(Desk(agent, ItemIndex(catalogue)), TOKEN, 8610, RateBound(burst=1e9))
    client = TestClient(app, HERE, headers={"Origin": HERE})
    client.cookies["pfm_agent_8610"] = TOKEN
    return client


@pytest.fixture
def browser(agent: PersonalAgent, model: Recommender) -> Iterator[TestClient]:
    with _browser(agent, model.catalogue) as client:
        yield client


@pytest.fixture
def newcomer(model: Recommender, tmp_path: Path) -> Iterator[TestClient]:
    """The browser of somebody of whom nothing is known."""
    with _browser(PersonalAgent(model, tmp_path / "new"), model.catalogue) as client:
        yield client


def _headings(page: str) -> list[str]:
    return [html.unescape(one) for one in re.findall(r"<h2[^>]*>(.*?)</h2>", page)]


def _said(page: str) -> str:
    (said,) = re.findall(r'<p id="said" role="status">(.*?)</p>', page)
    return html.unescape(said)


def test_the_list_is_that_of_the_agent(browser: TestClient, agent: PersonalAgent) -> None:
    shown = agent.recommend(12)
    page = browser.get("/").text
    assert _headings(page) == [one.title for one in shown]
    for one in shown:
        assert f"Number {one.place} for you, number {one.place_shared} by" in page
    by_all = [one.title for one in agent.recommend(12, weight=0)]
    assert _headings(browser.get("/list?weight=0").text) == by_all
    assert agent.settings.weight is None


@pytest.mark.parametrize("kind", ["like", "seen", "dislike", "less_like_this", "not_now"])
def test_what_is_said_shows_at_once_and_can_be_taken_back(
    browser: TestClient, agent: PersonalAgent, kind: str
) -> None:
    before, first = browser.get("/").text, agent.recommend(1)[0]
    page = browser.post("/feedback", data={"item_id": first.item_id, "kind": kind}).text
    assert first.title not in _headings(page)
    assert first.title in _said(page)
    assert _said(browser.get("/").text) == ""
    again = browser.post("/undo", data={"to": "/"}).text
    assert _headings(again) == _headings(before)
    assert "Taken back" in _said(again)


def test_whether_a_federation_may_learn_is_the_users_choice(
    browser: TestClient, agent: PersonalAgent
) -> None:
    assert 'aria-pressed="false" aria-describedby="contributes' in browser.get("/beliefs").text
    page = browser.post("/contributes", data={"contributes": "true"}).text
    assert 'aria-pressed="true" aria-describedby="contributes' in page
    assert agent.settings.contributes
    browser.post("/contributes", data={"contributes": "false"})
    assert not agent.settings.contributes


def test_nothing_is_kept_while_paused(browser: TestClient, agent: PersonalAgent) -> None:
    page = browser.post("/paused", data={"paused": "true"}).text
    assert "Your agent is paused" in page
    first = agent.recommend(1)[0]
    page = browser.post("/feedback", data={"item_id": first.item_id, "kind": "like"}).text
    assert _headings(page)[0] == first.title
    assert "kept nothing" in _said(page)


def test_somebody_unknown_begins_with_a_few_titles(newcomer: TestClient) -> None:
    page = newcomer.get("/").text
    items = re.findall(r'name="item_id" value="([^"]*)"', page)
    assert len(items) == 24
    assert "Pick a title" in _said(newcomer.post("/begin").text)
    page = newcomer.post("/begin", data={"item_id": items[:2]}).text
    assert "begins with 2 titles" in _said(page)
    assert "Your history has 2 titles" in page
    assert len(_headings(page)) == 12


def test_titles_are_found_and_say_whether_they_are_known(
    browser: TestClient, agent: PersonalAgent, model: Recommender
) -> None:
    met = model.catalogue.fields["title"][model.items([agent.history()[0].item_id])[0]]
    page = browser.get("/search", params={"q": met}).text
    assert met in page
    assert "In your history" in page
    assert "0 titles found" in browser.get("/search", params={"q": "zzzz"}).text


def test_reasons_are_shown_in_words(browser: TestClient, agent: PersonalAgent) -> None:
    first = agent.recommend(1)[0]
    found = agent.explain(first.item_id)
    page = html.unescape(browser.get(f"/why/{first.item_id}").text)
    assert found.sentence in page
    assert all(one.title in page for one in found.reasons[:2] if one.effect > 0)


def test_the_history_lets_events_go_and_count_no_more(
    browser: TestClient, agent: PersonalAgent
) -> None:
    first, second = (event.item_id for event in agent.history()[:2])
    page = browser.post("/history/counts", data={"item_id": first, "counts": "false"}).text
    assert "does not count" in page
    assert len(agent.known.counted) == len(agent.history()) - 1
    browser.post("/history/counts", data={"item_id": first, "counts": "true"})
    assert len(agent.known.counted) == len(agent.history())
    browser.post("/history/remove", data={"item_id": second})
    assert second not in {event.item_id for event in agent.history()}


def test_a_wish_is_listed_and_taken_back(browser: TestClient, agent: PersonalAgent) -> None:
    first = agent.recommend(1)[0].item_id
    browser.post("/feedback", data={"item_id": first, "kind": "less_like_this"})
    assert "Take back" in browser.get("/history").text
    browser.post("/strength", data={"strength": "0.5"})
    assert agent.settings.strength == 0.5
    assert "Take back" not in browser.post("/history/remove", data={"item_id": first}).text
    assert agent.known.less == ()


def test_the_weight_is_kept_and_left_to_training_again(
    browser: TestClient, agent: PersonalAgent
) -> None:
    assert 'value="0.25"' in browser.post("/weight", data={"weight": "0.25"}).text
    assert agent.settings.weight == 0.25
    browser.post("/weight")
    assert agent.settings.weight is None


def test_beliefs_have_their_evidence(browser: TestClient, agent: PersonalAgent) -> None:
    found, page = agent.beliefs(), browser.get("/beliefs").text
    assert f"because of {found.num_counted} events that count" in page
    assert f"{found.num_bytes:,} bytes" in page
    assert all(one.title in page for one in (*found.up, *found.down))
    assert "<dt>Last sync</dt><dd>never</dd>" in page
    assert "<dt>Bytes ever sent</dt><dd>0</dd>" in page


def test_all_is_exported_deleted_after_a_question_and_imported(
    browser: TestClient, agent: PersonalAgent
) -> None:
    before = agent.known
    export = browser.get("/memory/export")
    assert "your-agent.json" in export.headers["content-disposition"]
    assert "Delete everything?" in browser.get("/memory/delete").text
    assert agent.known == before
    page = browser.post("/memory/delete").text
    assert "holds 0 files now, and your agent knows 0 events" in page
    assert list(agent.folder.iterdir()) == []
    assert "Begin with a few titles" in browser.get("/").text
    page = browser.post("/memory/import", files={"file": export.content}).text
    assert "Imported" in _said(page)
    assert agent.known == before


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("/feedback", {"item_id": "nowhere", "kind": "like"}, "no item 'nowhere'"),
        ("/feedback", {"item_id": "i0", "kind": "adore"}, "no feedback 'adore'"),
        ("/weight", {"weight": "9"}, "weight"),
        ("/weight", {"weight": "much"}, "'much' is no number"),
        ("/strength", {"strength": "nan"}, "strength"),
        ("/history/remove", {"item_id": "nowhere"}, "no item 'nowhere'"),
        ("/history/counts", {"item_id": "nowhere", "counts": "true"}, "no item 'nowhere'"),
        ("/begin", {"item_id": ["nowhere"]}, "no item 'nowhere'"),
    ],
)
def test_a_wrong_request_is_answered_in_words_and_changes_nothing(
    browser: TestClient, agent: PersonalAgent, path: str, data: dict[str, str], message: str
) -> None:
    before = agent.known, agent.settings
    answer = browser.post(path, data=data)
    assert answer.status_code == 400
    assert message in html.unescape(answer.text)
    assert (agent.known, agent.settings) == before


def test_a_file_that_is_no_export_changes_nothing(
    browser: TestClient, agent: PersonalAgent
) -> None:
    before = agent.known
    answer = browser.post("/memory/import", files={"file": b"<script>"})
    assert answer.status_code == 400
    assert agent.known == before


def test_nobody_is_sent_elsewhere(browser: TestClient) -> None:
    answer = browser.post("/undo", data={"to": "https://evil.example"}, follow_redirects=False)
    assert answer.headers["location"] == "/"


def test_markup_in_titles_and_queries_is_text(agent: PersonalAgent, model: Recommender) -> None:
    hostile = '<script>alert(1)</script>"\x1b[31m'
    fields = dict(model.catalogue.fields)
    fields["title"] = tuple(f"{hostile} {one}" for one in fields["title"])
    with _browser(agent, Catalogue(model.catalogue.item_ids, fields)) as browser:
        for path in ("/history", "/search?q=red+fish", "/search?q=<script>alert(1)</script>"):
            page = browser.get(path).text
            assert "<script>alert" not in page
            assert "&lt;script&gt;alert" in page
            assert "\x1b" not in page
