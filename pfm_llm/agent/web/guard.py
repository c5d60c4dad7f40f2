"""What stands before every request: who asks, from where, how often and how much.

The server listens on loopback, but every page that is open in a browser can send requests there,
and so can every program and user of the machine. So a request needs a token; it must name this
host, as a name that an attacker lets point to 127.0.0.1 does not (DNS rebinding); and one that
changes something must come from a page of ours (cross-site request forgery).
"""

import http
import time
from collections.abc import Callable
from http.cookies import SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pfm_llm.agent.web.access import is_same

LARGEST, LARGEST_IMPORT = 64 * 1024, 16 * 1024 * 1024
"""Bytes of a request's body."""
IMPORTS = ("/memory/import", "/api/import")
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


class Guard:
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
        self._app, self._token, self._rate = app, token, rate
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._cookie = f"pfm_agent_{port}"  # cookies do not tell ports apart

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

        answer = self._answer(scope)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, scope: Scope) -> Response | None:
        """A refusal, or what greets a browser that brings the token; None: go on."""
        headers = Headers(scope=scope)
        if not self._rate.take():
            return _refusal(429, "Too many requests; try again in a second.", {"Retry-After": "1"})
        if headers.get("host") not in self._hosts:
            return _refusal(421, "This server answers as 127.0.0.1 and localhost alone.")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if scope["method"] == "GET" and scope["path"] == "/" and given:
            return self._welcome(given[0])
        return self._unknown(scope, headers) or _too_large(scope, headers)

    def _welcome(self, given: str) -> Response:
        if not is_same(given, self._token):
            return _refusal(401, "This is not the token of this agent.")
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
        return response

    def _unknown(self, scope: Scope, headers: Headers) -> Response | None:
        """A refusal where the token is not given, or given from a page that is not ours."""
        origin = headers.get("origin")
        is_ours = origin is not None and origin.removeprefix("http://") in self._hosts
        if origin is not None and not is_ours:
            return _refusal(403, "Requests from other pages are refused.")
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same(bearer.strip(), self._token):
            return None
        cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        if cookie is None or not is_same(cookie.value, self._token):
            message = "Open the address that `pfm agent` printed; a program sends "
            return _refusal(401, message + "Authorization: Bearer with the token of that address.")
        if scope["method"] not in _SAFE and not is_ours:
            return _refusal(403, "A change must come from a page of this agent.")
        return None


def _too_large(scope: Scope, headers: Headers) -> Response | None:
    if "transfer-encoding" in headers:
        return _refusal(411, "Say the length of the body.")
    bound = LARGEST_IMPORT if scope["path"] in IMPORTS else LARGEST
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > bound:
        return _refusal(413, f"A body has at most {bound:,} bytes here.")
    return None


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    title = http.HTTPStatus(status).phrase
    return PlainTextResponse(f"{status} {title}\n{message}\n", status, headers)
