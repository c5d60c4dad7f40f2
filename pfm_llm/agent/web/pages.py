"""The page: HTML that the server writes. Forms work without a script; a script makes them quick."""

import datetime
import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse

from pfm_llm.agent.actions import Kind
from pfm_llm.agent.reasons import FEW_EVENTS
from pfm_llm.agent.web.desk import Desk, lean
from pfm_llm.base.errors import DataError
from pfm_llm.base.templates import pages
from pfm_llm.base.terminal import harmless

NUM_CARDS, NUM_TO_BEGIN = 12, 24
HEAVIEST = 1.5
"""Of the slider; see `Settings.weight`."""
_SAID = {
    Kind.LIKE: "“{}” is in your history now.",
    Kind.SEEN: "“{}” is in your history now.",
    Kind.DISLIKE: "“{}” is not shown again.",
    Kind.LESS_LIKE_THIS: "“{}” is not shown again, and similar titles go down.",
    Kind.NOT_NOW: "“{}” is not shown for a month.",
}
_PLACES = ("/", "/history", "/beliefs", "/memory", "/memory/deleted")

router = APIRouter(include_in_schema=False)


class Pages:
    """Renders the pages of one agent.

    Args:
        desk: The agent.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.notice = ""
        """What the next page says of what was done."""
        self._templates = pages("pfm_llm.agent.web")
        self._templates.filters |= {
            "plain": harmless,
            "percent": lambda share: round(100 * share),
            "lean": lean,
            "without": lambda effect: math.exp(-effect),
            "day": lambda at: datetime.datetime.fromtimestamp(at).strftime("%d %B %Y"),
        }

    def show(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page by the name of its template."""
        agent = self.desk.agent
        notice, self.notice = self.notice, ""
        always = {"notice": notice, "settings": agent.settings, "folder": agent.folder}
        return self.part(name, status, page=name, **always, **values)

    def part(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """What a template makes of some values, with nothing around it."""
        html = self._templates.get_template(f"{name}.html.j2").render(**values)
        return HTMLResponse(html, status)


def _pages_of(request: Request) -> Pages:
    found: Pages = request.app.state.pages
    return found


OfPages = Annotated[Pages, Depends(_pages_of)]
Text = Annotated[str, Form()]


def error_page(request: Request, message: str) -> Response:
    """An error of ours, as a page."""
    return _pages_of(request).show("error", 400, message=message)


@router.get("/")
def home(pages: OfPages) -> Response:
    """The list; to somebody of whom nothing is known, titles to begin with."""
    agent = pages.desk.agent
    num_events = len(agent.history())
    if not num_events:
        return pages.show("begin", cards=_first_titles(pages.desk))
    return pages.show(
        "list",
        cards=agent.recommend(NUM_CARDS),
        few=num_events < FEW_EVENTS,
        num_events=num_events,
        weight=agent.weight,
        heaviest=HEAVIEST,
    )


@router.get("/list")
def cards(pages: OfPages, weight: float) -> Response:
    """The cards alone, in the order of a weight that is not kept: the list follows the slider."""
    return pages.part("cards", cards=pages.desk.agent.recommend(NUM_CARDS, weight=weight))


def _first_titles(desk: Desk) -> list[Any]:
    """What most people like; nothing where the model cannot tell."""
    try:
        return list(desk.agent.recommend(NUM_TO_BEGIN))
    except DataError:
        return []


@router.get("/search")
def search(pages: OfPages, q: str = "") -> Response:
    """Items by title."""
    met = {event.item_id for event in pages.desk.agent.history()}
    return pages.show("search", query=q, found=pages.desk.items.search(q), met=met)


@router.get("/why/{item_id:path}")
def why(pages: OfPages, item_id: str) -> Response:
    """The reasons of an item."""
    return pages.show("why", why=pages.desk.agent.explain(item_id))


@router.get("/history")
def history(pages: OfPages) -> Response:
    """What the user met, and what they turned down."""
    desk = pages.desk
    return pages.show("history", events=desk.history(), turned_down=desk.turned_down())


@router.get("/beliefs")
def beliefs(pages: OfPages) -> Response:
    """What the agent believes."""
    return pages.show("beliefs", beliefs=pages.desk.agent.beliefs())


@router.get("/memory")
def memory(pages: OfPages) -> Response:
    """Export, import, delete."""
    return pages.show("memory", files=pages.desk.files())


@router.get("/memory/export")
def export(pages: OfPages) -> Response:
    """All that the agent knows, as a file."""
    kept = {"Content-Disposition": 'attachment; filename="your-agent.json"'}
    return Response(pages.desk.export(), media_type="application/json", headers=kept)


@router.get("/memory/delete")
def ask_to_delete(pages: OfPages) -> Response:
    """Ask before everything is deleted."""
    return pages.show("delete", files=pages.desk.files())


@router.post("/memory/delete")
def delete(pages: OfPages) -> Response:
    """Delete everything."""
    gone = pages.desk.agent.forget()
    pages.notice = f"Deleted. {gone} actions are gone, with all settings."
    return _to("/memory/deleted")


@router.get("/memory/deleted")
def deleted(pages: OfPages) -> Response:
    """What is left."""
    return pages.show("deleted", files=pages.desk.files(), num=len(pages.desk.agent.history()))


@router.post("/memory/import")
def import_(pages: OfPages, file: UploadFile) -> Response:
    """Replace everything by the file of an export."""
    pages.desk.import_(file.file.read())
    pages.notice = "Imported: your agent knows what the file holds, and nothing else."
    return _to("/memory")


@router.post("/feedback")
def feedback(pages: OfPages, item_id: Text, kind: Text) -> Response:
    """Take in what the user says of an item."""
    kept = pages.desk.agent.feedback(item_id, kind)
    said = _SAID[Kind(kind)].format(harmless(pages.desk.items.item(item_id).title))
    pages.notice = said if kept else "Your agent is paused, and kept nothing."
    return _to("/")


@router.post("/begin")
def begin(pages: OfPages, item_id: Annotated[list[str], Form()] = []) -> Response:  # noqa: B006
    """Take some titles as the beginning of a history."""
    pages.desk.agent.add_history(item_id)
    many = len(item_id)
    pages.notice = f"Your history begins with {many} titles." if many else "Pick a title."
    return _to("/")


@router.post("/undo")
def undo(pages: OfPages, to: Text = "/") -> Response:
    """Take back the last action."""
    taken = pages.desk.agent.undo()
    pages.notice = "Taken back, as if it had never been." if taken else "There is nothing to undo."
    return _to(to)


@router.post("/weight")
def set_weight(pages: OfPages, weight: Text = "") -> Response:
    """Set how strongly the private part counts; an empty text: as training chose it."""
    pages.desk.agent.mix(_number(weight) if weight else None)
    return _to("/")


@router.post("/strength")
def set_strength(pages: OfPages, strength: Text) -> Response:
    """Set how strongly "less like this" acts."""
    pages.desk.agent.set_strength(_number(strength))
    pages.notice = "Kept."
    return _to("/history")


@router.post("/paused")
def set_paused(pages: OfPages, paused: Annotated[bool, Form()], to: Text = "/") -> Response:
    """Keep nothing, or keep on."""
    pages.desk.agent.pause(paused)
    pages.notice = "Paused: nothing is kept." if paused else "Your agent learns again."
    return _to(to)


@router.post("/contributes")
def set_contributes(pages: OfPages, contributes: Annotated[bool, Form()]) -> Response:
    """Let a federation learn from the history, or not."""
    pages.desk.agent.contribute(contributes)
    pages.notice = f"A federation may {'' if contributes else 'not '}learn from your history."
    return _to("/beliefs")


@router.post("/history/remove")
def remove(pages: OfPages, item_id: Text) -> Response:
    """Delete every action about an item."""
    title = harmless(pages.desk.items.item(item_id).title)
    pages.desk.agent.forget(item_id)
    pages.notice = f"“{title}” is removed, as if it had never been."
    return _to("/history")


@router.post("/history/counts")
def set_counts(pages: OfPages, item_id: Text, counts: Annotated[bool, Form()]) -> Response:
    """Let the events of an item count, or count no more."""
    title = harmless(pages.desk.items.item(item_id).title)
    if counts:
        pages.desk.agent.include(item_id)
    else:
        pages.desk.agent.exclude(item_id)
    pages.notice = f"“{title}” {'counts again' if counts else 'counts no more'}."
    return _to("/history")


def _to(place: str) -> Response:
    return RedirectResponse(place if place in _PLACES else "/", 303)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{text!r} is no number") from None
