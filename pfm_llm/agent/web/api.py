"""The same for programs: JSON over HTTP, described by OpenAPI at ``/api/openapi.json``."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from pfm_llm.agent.actions import Action, Event, Kind
from pfm_llm.agent.agent import Suggestion
from pfm_llm.agent.beliefs import Beliefs
from pfm_llm.agent.folder import Settings
from pfm_llm.agent.reasons import Explanation
from pfm_llm.agent.web.desk import Desk, Item
from pfm_llm.base.errors import DataError

router = APIRouter(prefix="/api", tags=["agent"])
OpenDesk = Callable[[Request], AbstractContextManager[Desk]]


def desk_of(request: Request) -> Iterator[Desk]:
    """The desk of who asks, for the time of the request."""
    open_desk: OpenDesk = request.app.state.open_desk
    with open_desk(request) as desk:
        yield desk


OfAgent = Annotated[Desk, Depends(desk_of, scope="function")]
Count = Annotated[int, Query(ge=1, le=100)]


class Feedback(BaseModel):
    """What the user says of an item."""

    kind: Kind
    rating: float | None = None


class NewSettings(BaseModel):
    """Settings to change; what is left out stays."""

    weight: float | None = Field(None, ge=0, le=1.5)
    strength: float | None = Field(None, ge=0, le=1)
    paused: bool | None = None
    contributes: bool | None = None


class Kept(BaseModel):
    """Whether something was kept; an agent that is paused keeps nothing."""

    kept: bool


@router.get("/recommendations")
def recommendations(
    desk: OfAgent,
    k: Count = 10,
    weight: Annotated[float | None, Query(ge=0, le=1.5)] = None,
    where: Annotated[
        list[str] | None, Query(description="field:text, such as genres:comedy", max_length=10)
    ] = None,
) -> list[Suggestion]:
    """The best items that the user has not met and has not turned down."""
    wanted = [one.partition(":") for one in where or ()]
    return desk.agent.recommend(k, {name: text for name, _, text in wanted}, weight)


@router.get("/items")
def items(desk: OfAgent, query: str, k: Count = 10) -> list[Item]:
    """Items whose title is about the query; typos are forgiven."""
    return desk.items.search(query, k)


@router.get("/items/{item_id}/explanation")
def explanation(desk: OfAgent, item_id: str) -> Explanation:
    """Why an item stands where it stands; it takes a pass for each event of the history."""
    return desk.agent.explain(item_id)


@router.post("/items/{item_id}/feedback")
def feedback(desk: OfAgent, item_id: str, said: Feedback) -> Kept:
    """Take in what the user says of an item."""
    return Kept(kept=desk.agent.feedback(item_id, said.kind, said.rating))


@router.get("/history")
def history(desk: OfAgent) -> list[Event]:
    """All events, oldest first, those that do not count too."""
    return list(desk.agent.history())


@router.post("/history", status_code=204)
def add_history(desk: OfAgent, item_ids: Annotated[list[str], Body(embed=True)]) -> None:
    """Add items that the user met, oldest first."""
    desk.agent.add_history(item_ids)


@router.delete("/history/{item_id}", status_code=204)
def forget(desk: OfAgent, item_id: str) -> None:
    """Delete every action about an item."""
    if not desk.agent.forget(item_id):
        raise DataError(f"nothing is known of {item_id}; there is nothing to delete")


@router.put("/history/{item_id}/counts", status_code=204)
def set_counts(desk: OfAgent, item_id: str, counts: Annotated[bool, Body(embed=True)]) -> None:
    """Let the events of an item count, or count no more."""
    if counts:
        desk.agent.include(item_id)
    else:
        desk.agent.exclude(item_id)


@router.post("/undo")
def undo(desk: OfAgent) -> Action | None:
    """Take back the last action."""
    return desk.agent.undo()


@router.get("/settings")
def settings(desk: OfAgent) -> Settings:
    """What the user has set."""
    return desk.agent.settings


@router.patch("/settings")
def change_settings(desk: OfAgent, new: NewSettings) -> Settings:
    """Change settings; ``weight: null`` is the weight that training chose."""
    given = new.model_fields_set
    if "weight" in given:
        desk.agent.mix(new.weight)
    if new.strength is not None:
        desk.agent.set_strength(new.strength)
    if new.paused is not None:
        desk.agent.pause(new.paused)
    if new.contributes is not None:
        desk.agent.contribute(new.contributes)
    return desk.agent.settings


@router.get("/beliefs")
def beliefs(desk: OfAgent) -> Beliefs:
    """What the agent believes of its user, and what for."""
    return desk.agent.beliefs()


@router.get("/export")
def export(desk: OfAgent) -> Response:
    """All that the agent knows, as one file."""
    return Response(desk.export(), media_type="application/json")


@router.post("/import", status_code=204)
def import_(desk: OfAgent, content: Annotated[dict[str, Any], Body()]) -> None:
    """Replace all that the agent knows by the file of an export, which is the body."""
    desk.import_(json.dumps(content).encode())


@router.delete("/memory")
def forget_everything(desk: OfAgent) -> int:
    """Delete all that the agent knows; the answer is the number of actions that are gone."""
    return desk.agent.forget()
