"""The page of an agent in a real browser: the main path, a beginning, wishes, and moving house.

It needs the extra [agent-test] and a Chromium; `make agent-test` brings the first.
"""

import importlib.resources
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra [agent] is not installed")
pytest.importorskip("playwright.sync_api", reason="needs the extra [agent-test]")
pytest.importorskip("axe_playwright_python", reason="needs the extra [agent-test]")

from playwright.sync_api import expect, sync_playwright

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.base.processes import Processes
from pfm_llm.recommender import Recommender
from tests.support.agent_page import CHROMIUM, TOKEN, served
from tests.support.agents import HISTORY, tiny_recommender
from tests.support.tiny import Tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
AXE = "axe_playwright_python"


@pytest.fixture(scope="module")
def model(
    tiny: Tiny, one_process: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Recommender:
    return tiny_recommender(tiny, one_process, tmp_path_factory.mktemp("run"))


@pytest.fixture
def agent(model: Recommender, tmp_path: Path) -> PersonalAgent:
    agent = PersonalAgent(model, tmp_path / "me")
    agent.add_history([model.catalogue.item_ids[item] for item in HISTORY])
    return agent


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where this process connects to."""
    made: list[Any] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        made.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return made


@pytest.fixture
def page(agent: PersonalAgent, model: Recommender, chromium: Any) -> Iterator[Any]:
    """The page, opened with the token; at its end nothing was asked of another host."""
    with served(Desk(agent, ItemIndex(model.catalogue))) as at:
        context = chromium.new_context(base_url=at, viewport=DESK)
        page, asked, faults = context.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto(f"/?token={TOKEN}")
        yield page
        context.close()
        assert faults == []
        assert {urlsplit(url).netloc for url in asked} == {urlsplit(at).netloc}


def _titles(page: Any) -> list[str]:
    found: list[str] = page.locator("#list h2").all_inner_texts()
    return found


def _shown(agent: PersonalAgent, **options: Any) -> list[str]:
    return [one.title for one in agent.recommend(12, **options)]


def _button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def _expect_list(page: Any, titles: list[str]) -> None:
    expect(page.locator("#list h2")).to_have_text(titles)


def test_the_main_path(page: Any, agent: PersonalAgent, connections: list[Any]) -> None:
    before = _shown(agent)
    _expect_list(page, before)
    assert "token" not in page.url
    card = page.locator("#list li").first
    card.get_by_text("Why?").click()
    why = agent.explain(agent.recommend(1)[0].item_id)
    expect(card.locator(".reasons")).to_contain_text(why.sentence)
    _button(page, f"I like it: {before[0]}").click()
    expect(page.locator("#said")).to_contain_text("is in your history now")
    _expect_list(page, _shown(agent))
    assert before[0] not in _titles(page)
    _button(page, "Undo the last action").click()
    _expect_list(page, before)
    page.get_by_role("link", name="What it believes").click()
    expect(page.locator("h1")).to_have_text("What your agent believes")
    assert connections == []


def test_the_list_follows_the_slider_and_the_weight_is_kept(
    page: Any, agent: PersonalAgent
) -> None:
    slider = page.get_by_label("How strongly your own part counts")
    slider.focus()
    page.keyboard.press("Home")
    _expect_list(page, _shown(agent, weight=0))
    expect(page.locator("#said")).to_contain_text("counts 0")
    assert agent.settings.weight == 0
    assert slider.evaluate("one => one === document.activeElement")
    _button(page, "As training chose").click()
    _expect_list(page, _shown(agent))
    assert agent.settings.weight is None


def test_less_like_this(page: Any, agent: PersonalAgent) -> None:
    before = _titles(page)
    _button(page, f"Less like this: {before[2]}").click()
    expect(page.locator("#said")).to_contain_text("similar titles go down")
    _expect_list(page, _shown(agent))
    assert _titles(page) != [one for one in before if one != before[2]]
    focused = page.evaluate("document.activeElement.textContent")
    assert focused == _titles(page)[2]
    page.get_by_role("link", name="History").click()
    _button(page, f"Take back: {before[2]}").click()
    expect(page.locator("#said")).to_contain_text("never been")
    page.get_by_role("link", name="Your list").click()
    _expect_list(page, before)


def test_a_beginning_with_search_and_picks(
    page: Any, agent: PersonalAgent, model: Recommender
) -> None:
    agent.forget()
    page.goto("/")
    expect(page.locator("h1")).to_have_text("Begin with a few titles")
    picks = page.get_by_role("checkbox")
    assert picks.count() == 24
    picks.nth(0).check()
    picks.nth(3).check()
    _button(page, "Begin with these").click()
    expect(page.locator("h1")).to_have_text("Your list")
    assert len(agent.history()) == 2
    page.get_by_label("Search by title").press_sequentially("gren bot")
    expect(page.locator("#found strong").first).to_have_text("green boat")
    _button(page.locator("#found"), "I like it: green boat").click()
    expect(page.locator("#said")).to_contain_text("“green boat” is in your history")
    _expect_list(page, _shown(agent))
    assert len(agent.history()) == 3


def test_export_delete_import(page: Any, agent: PersonalAgent, tmp_path: Path) -> None:
    before, titles = agent.known, _titles(page)
    page.get_by_role("link", name="Your data").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    download.value.save_as(tmp_path / "mine.json")
    assert len(json.loads((tmp_path / "mine.json").read_text())["actions"]) == len(HISTORY)
    page.get_by_role("link", name="Delete everything").click()
    assert agent.known == before
    _button(page, "Delete everything").click()
    expect(page.locator("h1")).to_have_text("Deleted")
    expect(page.locator("main")).to_contain_text("holds 0 files now")
    assert list(agent.folder.iterdir()) == []
    page.get_by_role("link", name="import an export").click()
    page.get_by_label("File").set_input_files(tmp_path / "mine.json")
    _button(page, "Import").click()
    expect(page.locator("#said")).to_contain_text("Imported")
    assert agent.known == before
    page.get_by_role("link", name="Your list").click()
    _expect_list(page, titles)


def test_an_event_counts_no_more_and_is_removed(page: Any, agent: PersonalAgent) -> None:
    page.goto("/history")
    page.get_by_role("button", name="Don't count").first.click()
    expect(page.locator("#said")).to_contain_text("counts no more")
    assert len(agent.known.counted) == len(HISTORY) - 1
    page.get_by_role("button", name="Remove").first.click()
    expect(page.locator("#said")).to_contain_text("is removed")
    assert len(agent.history()) == len(HISTORY) - 1


def test_all_works_with_the_keyboard(page: Any, agent: PersonalAgent) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the content
    assert page.evaluate("document.activeElement.id") == "main"
    first = _titles(page)[0]
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == f"Not for me: {first}":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("is not shown again")
    assert page.evaluate("document.activeElement.textContent") == _titles(page)[0]


VIEWS = (
    *("/", "/search?q=fish", "/history", "/beliefs", "/memory", "/memory/delete"),
    *("/memory/deleted", "/why/{item}", "/why/nowhere"),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_screen(
    agent: PersonalAgent, model: Recommender, chromium: Any, scheme: str, size: dict[str, int]
) -> None:
    first, second = agent.recommend(2)
    agent.feedback(first.item_id, "less_like_this")
    axe = (importlib.resources.files(AXE) / "axe.min.js").read_text()
    with served(Desk(agent, ItemIndex(model.catalogue))) as at:
        options = {"color_scheme": scheme, "viewport": size, "bypass_csp": True}
        context = chromium.new_context(base_url=at, **options)  # axe itself is a foreign script
        page = context.new_page()
        page.goto(f"/?token={TOKEN}")
        for view in (*VIEWS, "empty", "empty history"):
            if view == "empty":
                agent.forget()
            address = {"empty": "/", "empty history": "/history"}.get(view, view)
            page.goto(address.format(item=second.item_id))
            page.evaluate(axe)
            found = page.evaluate("axe.run()")["violations"]
            assert [(view, one["id"], one["nodes"][0]["html"]) for one in found] == []
            width = page.evaluate("document.documentElement.scrollWidth")
            assert (view, width) == (view, size["width"])
        context.close()


def test_axe_sees_a_fault(chromium: Any) -> None:
    page = chromium.new_page()
    page.set_content("<main><img src='x.png'><input></main>")
    page.evaluate((importlib.resources.files(AXE) / "axe.min.js").read_text())
    found = {one["id"] for one in page.evaluate("axe.run()")["violations"]}
    assert {"image-alt", "label"} <= found
    page.close()


def test_without_a_script_the_same_forms_work(
    agent: PersonalAgent, model: Recommender, chromium: Any
) -> None:
    with served(Desk(agent, ItemIndex(model.catalogue))) as at:
        context = chromium.new_context(base_url=at, java_script_enabled=False)
        page = context.new_page()
        page.goto(f"/?token={TOKEN}")
        first = _titles(page)[0]
        _button(page, f"Not for me: {first}").click()
        expect(page.locator("#said")).to_contain_text("is not shown again")
        assert first not in _titles(page)
        page.get_by_label("Search by title").fill("gren boat")
        _button(page, "Search").click()
        expect(page.locator("#found strong").first).to_have_text("green boat")
        context.close()
