"""Applications: one person's page, HTTP API and MCP, and what the API of many users shares."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.telemetry import TelemetryConfig
from starlette.types import ASGIApp

from pfm_llm import __version__
from pfm_llm.agent.web import api, pages
from pfm_llm.agent.web.desk import Desk
from pfm_llm.agent.web.guard import RETRY, PageGuard, RateBound
from pfm_llm.agent.web.mcp_server import make_mcp
from pfm_llm.base.errors import BusyError, PfmError

_THREADS = 8
"""Requests that are worked on at a time; the model serves one at a time in any case."""

_SILENT: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""No telemetry, whatever the environment says: addresses and bodies are private."""
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def make_app(desk: Desk, token: str, port: int, rate: RateBound | None = None) -> ASGIApp:
    """The application of one agent.

    Args:
        desk: The agent.
        token: What every request must bring; see `PageGuard`.
        port: The port of the server on 127.0.0.1.
        rate: The bound on requests; None: the usual one.
    """
    mcp = make_mcp(desk)
    for_assistants = mcp.streamable_http_app(json_response=True, stateless_http=True)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        allow_threads(_THREADS)
        async with mcp.session_manager.run():
            yield

    about = "One person's recommendations; every request brings the agent's token."
    app = api_app("pfm agent", about, lambda _: contextlib.nullcontext(desk), lifespan)
    app.state.pages = pages.Pages(desk)
    app.include_router(pages.router)
    app.router.routes.extend(for_assistants.routes)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_exception_handler(PfmError, _said)
    return PageGuard(app, token, port, rate or RateBound())


def api_app(title: str, about: str, open_desk: api.OpenDesk, lifespan: Lifespan) -> FastAPI:
    """An application with the HTTP API alone.

    Args:
        title: Its name in the description.
        about: What the description says of it.
        open_desk: The desk of who sends a request.
        lifespan: What surrounds its life.
    """
    app = FastAPI(
        title=title,
        version=__version__,
        description=about,
        openapi_url="/api/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        telemetry=_SILENT,
    )
    app.state.open_desk = open_desk
    app.include_router(api.router)
    return app


def allow_threads(count: int) -> None:
    """Let so many requests be worked on at a time; for a lifespan."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = count


def said(error: Exception) -> Response:
    """Our errors say what to do, here to a program."""
    if isinstance(error, BusyError):
        return JSONResponse({"detail": str(error)}, 503, RETRY)
    return JSONResponse({"detail": str(error)}, 400)


def _said(request: Request, error: Exception) -> Response:
    """A program gets an error as JSON, a person as a page."""
    if request.url.path.startswith("/api/"):
        return said(error)
    return pages.error_page(request, str(error))
