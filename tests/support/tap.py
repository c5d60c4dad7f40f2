"""A tap on a connection: all bytes are passed on, and what comes from one side is kept."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

_AT_ONCE = 1 << 16

Open = Callable[[str | None], socket.socket]
"""Connects to the other side; it is given the protocol that TLS has agreed on, if any."""


class Tap:
    """Listens in place of a server, and passes on to it.

    Args:
        listener: Where clients connect; it is closed at the end.
        upstream: Opens a connection to the server.
        tls: Ends TLS of the clients here; None: there is none.

    Attributes:
        from_clients: All that clients have sent, a piece for each connection.
        from_server: All that the server has sent.
    """

    def __init__(
        self, listener: socket.socket, upstream: Open, tls: ssl.SSLContext | None = None
    ) -> None:
        self._listener, self._upstream, self._tls = listener, upstream, tls
        self.from_clients: list[bytearray] = []
        self.from_server: list[bytearray] = []

    @classmethod
    def on_socket(cls, path: Path, behind: Path) -> Self:
        """A tap at a Unix socket, before the socket of a worker."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))

        def upstream(protocol: str | None) -> socket.socket:
            found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            found.connect(str(behind))
            return found

        return cls(listener, upstream)

    def __enter__(self) -> Self:
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # at the end
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either side may go at any time
            protocol = None
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
                protocol = client.selected_alpn_protocol()
            server = self._upstream(protocol)
            for one, other, pieces in (
                (client, server, self.from_clients),
                (server, client, self.from_server),
            ):
                pieces.append(bytearray())
                words = (one, other, pieces[-1])
                threading.Thread(target=_pass_on, args=words, daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := one.recv(_AT_ONCE):
            kept += piece
            other.sendall(piece)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)
