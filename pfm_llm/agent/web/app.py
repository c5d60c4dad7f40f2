"""The application: the page, the HTTP API and MCP behind one guard."""

import contextlib
from collections.abc import AsyncIterator
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
from pfm_llm.agent.web.guard import Guard, RateBound
from pfm_llm.agent.web.mcp_server import make_mcp
from pfm_llm.base.errors import PfmError

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


def make_app(desk: Desk, token: str, port: int, rate: RateBound | None = None) -> ASGIApp:
    """The application of one agent.

    Args:
        desk: The agent.
        token: What every request must bring; see `Guard`.
        port: The port of the server on 127.0.0.1.
        rate: The bound on requests; None: the usual one.
    """
    mcp = make_mcp(desk)
    for_assistants = mcp.streamable_http_app(json_response=True, stateless_http=True)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        async with mcp.session_manager.run():
            yield

    app = FastAPI(
        title="pfm agent",
        version=__version__,
        description="One person's recommendations; every request brings the agent's token.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        telemetry=_SILENT,
    )
    app.state.desk = desk
    app.state.pages = pages.Pages(desk)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.router.routes.extend(for_assistants.routes)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_exception_handler(PfmError, _said)
    return Guard(app, token, port, rate or RateBound())


def _said(request: Request, error: Exception) -> Response:
    """Our errors say what to do; a program gets them as JSON, a person as a page."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": str(error)}, 400)
    return pages.error_page(request, str(error))
