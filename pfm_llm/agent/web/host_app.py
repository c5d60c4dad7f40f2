"""The application of a host: the HTTP API of each user's agent behind one guard.

Routes and models are those of one person's agent, so that a program can use either.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from pfm_llm.agent.host.service import HostService
from pfm_llm.agent.web.app import allow_threads, api_app, said
from pfm_llm.agent.web.desk import Desk, ItemIndex
from pfm_llm.agent.web.guard import RETRY
from pfm_llm.agent.web.host_guard import HEALTH, METRICS, HostGuard, unknown
from pfm_llm.agent.web.metrics import Gauges, Metered, Metrics
from pfm_llm.base.errors import AccessError, BusyError, DataError, PfmError

_log = logging.getLogger(__name__)
_ABOUT = "Recommendations for one of many users; every request brings the user's token."


def make_host_app(service: HostService, operator: str) -> ASGIApp:
    """The application of a host; it closes the host when it ends.

    Args:
        service: The host.
        operator: The operator's token; see `HostGuard`.
    """
    items = ItemIndex(service.catalogue)

    @contextlib.contextmanager
    def open_desk(request: Request) -> Iterator[Desk]:
        with service.users.using(request.state.account) as agent:
            yield Desk(agent, items)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A thread for each request that the guard lets through: who waits for a turn or a pass
        # cannot keep away the one that they wait for.
        allow_threads(service.bounds.at_once)
        yield
        service.close()

    app = api_app("pfm host", _ABOUT, open_desk, lifespan)
    app.add_exception_handler(PfmError, _said)
    guard = HostGuard(app, service, operator)
    metrics = Metrics(service.batcher, _gauges(service, guard))

    @app.get(HEALTH, include_in_schema=False)
    async def health() -> Response:
        if service.is_stopping:
            return PlainTextResponse("stopping\n", 503, RETRY)
        return PlainTextResponse("ok\n")

    @app.get(METRICS, include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return Metered(guard, metrics)


def _gauges(service: HostService, guard: HostGuard) -> Gauges:
    return {
        "pfm_users": ("Users of the host.", lambda: len(service.accounts.by_key())),
        "pfm_open_agents": ("Agents in memory.", lambda: service.users.num_open),
        "pfm_running": ("Requests of users that are worked on.", lambda: guard.num_running),
    }


def _said(_: Request, error: Exception) -> Response:
    """A user is told what they can mend; the rest is for the operator, in the log."""
    if isinstance(error, AccessError):
        return unknown()
    if isinstance(error, DataError | BusyError):
        return said(error)
    _log.error("a request failed: %s", error)
    message = "the host could not read or write the agent's memory; tell its operator\n"
    return PlainTextResponse(message, 500)
