"""Make the pictures of docs/agent.md: ``python -m tests.support.agent_screenshots RUN USER``.

It needs the extra [agent-test] and a Chromium, and prints how long the page took.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import expect, sync_playwright

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.recommender import Recommender
from tests.support.agent_page import CHROMIUM, TOKEN, served

DOCS = Path(__file__).parents[2] / "docs"
MOVES = 15
LIST_IS_NEW = """(weight) => new Promise((done) => {
  const start = performance.now();
  new MutationObserver((_, observer) => { observer.disconnect(); done(performance.now() - start); })
    .observe(document.getElementById("main"), { childList: true });
  const slider = document.getElementById("weight");
  slider.value = weight;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
})"""


def main() -> None:
    """Serve the agent of a run's user, measure, and take the pictures."""
    run, user = sys.argv[1:]
    model = Recommender.from_pretrained(run, user=user)
    assert model.owner is not None
    torch.set_num_threads(1)  # as `pfm agent` does
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tool:
        agent = PersonalAgent(model, Path(folder) / "agent")
        ids = model.catalogue.item_ids
        agent.add_history([ids[item] for item in model.owner.history.items])
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with served(Desk(agent, ItemIndex(model.catalogue))) as at:
            page = browser.new_page(base_url=at, viewport={"width": 1120, "height": 860})
            _measure(page, agent)
            _picture(page)
        browser.close()


def _measure(page: Any, agent: PersonalAgent) -> None:
    page.goto(f"/?token={TOKEN}")
    start = time.perf_counter()
    page.goto("/")
    print(f"a list on a warm page: {time.perf_counter() - start:.2f} s")  # noqa: T201
    moves = sorted(page.evaluate(LIST_IS_NEW, 0.1 + 0.05 * n) for n in range(MOVES))
    print(f"a move of the slider: median {moves[MOVES // 2]:.0f} ms, most {moves[-1]:.0f} ms")  # noqa: T201
    start = time.perf_counter()
    page.locator("#list li").first.get_by_role("button", name="Less like this").click()
    expect(page.locator("#said")).to_contain_text("similar titles go down")
    print(f"feedback until it shows: {time.perf_counter() - start:.2f} s")  # noqa: T201
    agent.undo()


def _picture(page: Any) -> None:
    page.goto("/")
    start = time.perf_counter()
    card = page.locator("#list li").first
    card.get_by_text("Why?").click()
    expect(card.locator(".reasons")).to_contain_text("because of", timeout=60_000)
    print(f"the reasons of the first card: {time.perf_counter() - start:.2f} s")  # noqa: T201
    page.locator("h1").click()
    page.screenshot(path=DOCS / "agent.png")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 720, "height": 860})
    page.goto("/beliefs")
    page.screenshot(path=DOCS / "agent-beliefs.png")


if __name__ == "__main__":
    main()
