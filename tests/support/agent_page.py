"""An agent's page on loopback, in a thread of this process."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from pfm_llm.agent.web.app import make_app
from pfm_llm.agent.web.desk import Desk
from pfm_llm.agent.web.guard import RateBound

TOKEN = "t" * 43
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@contextlib.contextmanager
def served(desk: Desk, rate: RateBound | None = None) -> Iterator[str]:
    """The address of the page, without the token."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        app = make_app(desk, TOKEN, port, rate or RateBound(burst=1e9))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()
