"""What stands before the requests of a host's users: who asks, how often, and how many at a time.

A user's program sends a token with each request; there are no cookies that a foreign page could
use. Nothing is told to who has no token of the host, not even which addresses there are.
"""

from collections import Counter, defaultdict

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pfm_llm.agent.host.accounts import Account
from pfm_llm.agent.host.service import HostService
from pfm_llm.agent.web.access import is_same
from pfm_llm.agent.web.guard import (
    RETRY,
    Guard,
    RateBound,
    bearer,
    refusal,
    too_large,
    too_many,
)

HEALTH, METRICS = "/health", "/metrics"


class HostGuard(Guard):
    """Lets requests through that bring a user's token, within bounds.

    Args:
        app: What is guarded. Of a request that reaches it, ``state.account`` is the user.
        service: The host.
        operator: The token that opens `METRICS`, and nothing else. `HEALTH` needs none.
    """

    def __init__(self, app: ASGIApp, service: HostService, operator: str) -> None:
        super().__init__(app)
        self._service, self._operator = service, operator
        self._running: Counter[str] = Counter()
        bounds = service.bounds
        self._rates: defaultdict[str, RateBound] = defaultdict(
            lambda: RateBound(bounds.per_second, bounds.burst)
        )

    @property
    def num_running(self) -> int:
        """How many requests of users are worked on."""
        return self._running.total()

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        if scope["path"] == HEALTH:
            return None
        given = bearer(headers)
        account, is_operator = self._service.accounts.find(given), is_same(given, self._operator)
        if scope["path"] == METRICS:
            return None if is_operator else unknown()
        if account is None:
            return unknown()
        refused = self._beyond(account) or too_large(scope, headers)
        if refused is None:
            scope.setdefault("state", {})["account"] = account
        return refused

    def _beyond(self, account: Account) -> Response | None:
        """A refusal of what is beyond a bound."""
        if not self._rates[account.key].take():
            return too_many()
        if self._service.is_stopping:
            return refusal(503, "The service is stopping; ask again when it is back.", RETRY)
        if self._running[account.key] >= self._service.bounds.of_one:
            return refusal(429, "Your earlier requests are not answered yet; await them.", RETRY)
        if self.num_running >= self._service.bounds.at_once:
            return refusal(503, "Too many users are waiting; ask again in a moment.", RETRY)
        return None

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        account: Account | None = scope.get("state", {}).get("account")
        if account is None:
            return await self._app(scope, receive, send)
        self._running[account.key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[account.key] -= 1
            if not self._running[account.key]:
                del self._running[account.key]


def unknown() -> Response:
    """The answer to who brings no token of the host, whatever is wrong with it."""
    message = "Send Authorization: Bearer with the token that the operator gave you."
    return refusal(401, message, {"WWW-Authenticate": "Bearer"})
