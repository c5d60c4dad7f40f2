"""Serve an agent on this machine's loopback, or to an assistant over standard input and output."""

import errno
import socket
import webbrowser
from collections.abc import Callable

import uvicorn

from pfm_llm.agent.web.access import own_token
from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk
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
        config = uvicorn.Config(
            make_app(desk, token, port),
            log_level="warning",
            access_log=False,  # addresses hold the token
            server_header=False,
        )
        announce(address)
        if opens_browser:
            webbrowser.open(address)
        uvicorn.Server(config).run(sockets=[listener])


def serve_assistant(desk: Desk) -> None:
    """Answer the assistant that has started this process, over standard input and output."""
    make_mcp(desk).run("stdio")


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
