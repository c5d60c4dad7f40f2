"""What stands before every request: who asks, from where, how often and how much.

A personal agent listens on loopback, but every page that is open in a browser can send requests
there, and so can every program and user of the machine. So a request needs a token; it must name
this host, as a name that an attacker lets point to 127.0.0.1 does not (DNS rebinding); and one that
changes something must come from a page of ours (cross-site request forgery).
"""

import abc
import http
import time
from collections.abc import Callable, Mapping
from http.cookies import SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pfm_llm.agent.web.access import is_same

LARGEST, LARGEST_IMPORT = 64 * 1024, 16 * 1024 * 1024
"""Bytes of a request's body."""
IMPORTS = ("/memory/import", "/api/import")
RETRY = {"Retry-After": "1"}
"""Seconds."""
_SAFE = ("GET", "HEAD")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class RateBound:
    """At most so many requests a second, after a burst.

    Args:
        per_second: How many come back in a second.
        burst: How many there are at most.
        clock: Seconds.
    """

    def __init__(
        self,
        per_second: float = 20.0,
        burst: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._left, self._at = burst, clock()

    def take(self) -> bool:
        """Whether one more request is within the bound."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Guard(abc.ABC):
    """What an application stands behind: it refuses requests, or lets them through.

    Args:
        app: What is guarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand the request on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # there are no web sockets here
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self._answer(scope, Headers(scope=scope))
        await (answer or self._let_through)(scope, receive, send_with_headers)

    @abc.abstractmethod
    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """A refusal, or what needs no application; None: go on."""

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class PageGuard(Guard):
    """Lets requests through that bring the token from this host, within bounds.

    A browser brings the token once in the address, and then as a cookie that scripts cannot read;
    a program brings it as ``Authorization: Bearer``.

    Args:
        app: What is guarded.
        token: The token.
        port: The port of the server.
        rate: The bound on requests, of all together.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, rate: RateBound) -> None:
        super().__init__(app)
        self._token, self._rate = token, rate
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._cookie = f"pfm_agent_{port}"  # cookies do not tell ports apart

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        if not self._rate.take():
            return too_many()
        if headers.get("host") not in self._hosts:
            return refusal(421, "This server answers as 127.0.0.1 and localhost alone.")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if scope["method"] == "GET" and scope["path"] == "/" and given:
            return self._welcome(given[0])
        return self._unknown(scope, headers) or too_large(scope, headers)

    def _welcome(self, given: str) -> Response:
        if not is_same(given, self._token):
            return refusal(401, "This is not the token of this agent.")
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
        return response

    def _unknown(self, scope: Scope, headers: Headers) -> Response | None:
        """A refusal where the token is not given, or given from a page that is not ours."""
        origin = headers.get("origin")
        is_ours = origin is not None and origin.removeprefix("http://") in self._hosts
        if origin is not None and not is_ours:
            return refusal(403, "Requests from other pages are refused.")
        if is_same(bearer(headers), self._token):
            return None
        cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        if cookie is None or not is_same(cookie.value, self._token):
            message = "Open the address that `pfm agent` printed; a program sends "
            return refusal(401, message + "Authorization: Bearer with the token of that address.")
        if scope["method"] not in _SAFE and not is_ours:
            return refusal(403, "A change must come from a page of this agent.")
        return None


def bearer(headers: Headers) -> str:
    """The token of ``Authorization: Bearer``; empty where there is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def too_large(scope: Scope, headers: Headers) -> Response | None:
    """A refusal of a body that is too large, or that does not say how large it is."""
    if "transfer-encoding" in headers:
        return refusal(411, "Say the length of the body.")
    bound = LARGEST_IMPORT if scope["path"] in IMPORTS else LARGEST
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > bound:
        return refusal(413, f"A body has at most {bound:,} bytes here.")
    return None


def too_many() -> Response:
    """A refusal of what is beyond a rate."""
    return refusal(429, "Too many requests; try again in a second.", RETRY)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of one line that says what to do."""
    title = http.HTTPStatus(status).phrase
    return PlainTextResponse(f"{status} {title}\n{message}\n", status, headers)
