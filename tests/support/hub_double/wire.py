"""HTTP of the double: it reads calls, writes replies, and breaks connections when told to."""

import json
import os
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Call:
    """A request with its whole body.

    Attributes:
        method: Such as ``GET``; always as it was sent.
        path: Raw, without the query.
        query: Last value of each parameter.
        headers: By lower-case name.
        body: Content.
        parts: What stands in the path in the place of the names of a route; filled by it.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> "Reply":
        """A reply of JSON; ``_`` in the name of a header stands for ``-``."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        body = json.dumps(value).encode()
        return cls(status, {"Content-Type": "application/json; charset=utf-8", **named}, body)


@dataclass(frozen=True)
class Request:
    """A line of the double's log.

    Attributes:
        method: Such as ``GET``.
        path: With its query, unquoted.
        status: Of the answer; 0 when the connection was cut before it.
        authorised: Whether a token was sent, valid or not.
        range: The range that was asked for; empty for none.
    """

    method: str
    path: str
    status: int
    authorised: bool
    range: str


@dataclass
class Fault:
    """What happens to requests of a method whose path contains a text.

    Attributes:
        method: Such as ``GET``.
        path_part: The text, unquoted; the query counts as part of the path.
        times: How many more requests it happens to.
        reply: The answer instead of the true one; None cuts the connection.
        after_bytes: Cut after so many bytes of the request's body, or if it has none, of the
            answer's; None cuts at once.
        done: The request is carried out, and only then is the connection cut.
        reset: Cut with a reset, not with an orderly end.
    """

    method: str
    path_part: str
    times: int = 1
    reply: Reply | None = None
    after_bytes: int | None = None
    done: bool = False
    reset: bool = False


class Faults:
    """The faults that are still to come, in order."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._coming: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Let a fault come after those that wait already."""
        with self._lock:
            self._coming.append(fault)

    def take(self, method: str, target: str) -> Fault | None:
        """The fault of this request; it counts as happened."""
        with self._lock:
            for fault in self._coming:
                if fault.times > 0 and fault.method == method and fault.path_part in target:
                    fault.times -= 1
                    return fault
        return None

    def left(self) -> list[Fault]:
        """Those that have not happened as often as they should."""
        with self._lock:
            return [fault for fault in self._coming if fault.times > 0]

    def clear(self) -> None:
        """Let nothing more happen."""
        with self._lock:
            self._coming.clear()


class Listener(ThreadingHTTPServer):
    """A port of the loopback device; each connection has a thread.

    Args:
        answer: What replies to calls.
        faults: What goes wrong.
        log: Told of each request before its client sees the answer.

    Attributes:
        url: Where it listens.
        errors: Tracebacks of the double's own failures.
    """

    daemon_threads = True

    def __init__(
        self, answer: Callable[[Call], Reply], faults: Faults, log: Callable[[Request], None]
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.faults = faults
        self.log = log
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.errors: list[str] = []
        self._open: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, and remember it."""
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """End a connection, and forget it."""
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the double's; anything else is."""
        if not isinstance(sys.exception(), OSError):
            self.errors.append(traceback.format_exc())

    def server_close(self) -> None:
        """Stop listening, and end the connections that clients keep open."""
        super().server_close()
        for connection in tuple(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it ended by itself


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for a delayed acknowledgement

    def do_GET(self) -> None:
        """Answer any method; the names are http.server's."""
        target = unquote(self.path)
        fault = self._listener.faults.take(self.command, target)
        cut = fault if fault and fault.reply is None else None
        if cut and not cut.done and (cut.after_bytes is None or self._chunked or self._length):
            self._read(cut.after_bytes or 0)
            self._log(target, 0)
            self._cut(cut.reset)
            return
        body = self._read(None)
        reply = fault.reply if fault and fault.reply else self._answer(body)
        if cut and cut.done:
            self._log(target, 0)
        else:
            self._log(target, reply.status)
            self._send(reply, cut.after_bytes if cut else None)
        if cut:
            self._cut(cut.reset)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing goes to standard error."""

    @property
    def _listener(self) -> Listener:
        return cast(Listener, self.server)

    @property
    def _length(self) -> int:
        return int(self.headers.get("Content-Length", 0))

    @property
    def _chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _read(self, at_most: int | None) -> bytes:
        """The body, or the start of it."""
        if self._chunked:
            return self._read_chunks(at_most)
        size = self._length if at_most is None else min(self._length, at_most)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client went away")
        return body

    def _read_chunks(self, at_most: int | None) -> bytes:
        body = b""
        while at_most is None or len(body) < at_most:
            line = self.rfile.readline()
            if not line:
                raise ConnectionError("the client went away")
            size = int(line.split(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return body

    def _answer(self, body: bytes) -> Reply:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, url.path, query, headers, body)
        return self._listener.answer(call)

    def _log(self, target: str, status: int) -> None:
        authorised = "Authorization" in self.headers
        asked = self.headers.get("Range", "")
        request = Request(self.command, target, status, authorised, asked)
        self._listener.log(request)

    def _send(self, reply: Reply, at_most: int | None) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:at_most])

    def _cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            # An ordinary close would first say that all was sent.
            os.close(self.connection.detach())
