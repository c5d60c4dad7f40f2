"""Serve an agent or a host on this machine's loopback, or an assistant over pipes."""

import errno
import signal
import socket
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pfm_llm.agent.host.service import HostService
from pfm_llm.agent.web.access import own_token
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk
from pfm_llm.agent.web.host_app import make_host_app
from pfm_llm.agent.web.mcp_server import make_mcp
from pfm_llm.base.errors import ConfigError

_HOST = "127.0.0.1"


def serve_page(desk: Desk, port: int, opens_browser: bool, announce: Callable[[str], None]) -> None:
    """Serve the page, the HTTP API and MCP until the process is interrupted.

    Args:
        desk: The agent.
        port: On 127.0.0.1; 0: any that is free.
        opens_browser: Open the page in the user's browser.
        announce: Is told the address, with the token, once it answers.

    Raises:
        ConfigError: The port is taken.
    """
    token = own_token(desk.agent.folder)
    with _listening(port) as listener:
        port = listener.getsockname()[1]
        address = f"http://{_HOST}:{port}/?token={token}"
        config = _quiet(make_app(desk, token, port))
        announce(address)
        if opens_browser:
            webbrowser.open(address)
        uvicorn.Server(config).run(sockets=[listener])


def serve_host(
    service: HostService, operator: str, port: int, announce: Callable[[str], None]
) -> None:
    """Serve the HTTP API of many users until SIGTERM; then answer who waits, and return.

    Call it in the main thread.

    Args:
        service: The host.
        operator: The operator's token.
        port: On 127.0.0.1; 0: any that is free.
        announce: Is told the address, once it answers.

    Raises:
        ConfigError: The port is taken.
    """
    with _listening(port) as listener:
        config = _quiet(make_host_app(service, operator))
        announce(f"http://{_HOST}:{listener.getsockname()[1]}")
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
        _HostServer(config, service).run(sockets=[listener])


class _HostServer(uvicorn.Server):
    """A server that tells its host when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, service: HostService) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; uvicorn answers those that it has."""
        self._service.is_stopping = True
        super().handle_exit(sig, frame)


def serve_assistant(desk: Desk) -> None:
    """Answer the assistant that has started this process, over standard input and output."""
    make_mcp(desk).run("stdio")


def _quiet(app: ASGIApp) -> uvicorn.Config:
    """A server's settings; it notes no access, since addresses and times tell of people."""
    return uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(f"port {port} of {_HOST} is not free; give another --port") from error
        raise
    return listener
