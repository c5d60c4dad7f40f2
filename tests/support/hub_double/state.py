"""What the routes of the double work on: its repos, who may do what, and how it says no."""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from threading import RLock
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

from tests.support.hub_double.store import MAIN, Commit, Repo
from tests.support.hub_double.wire import Call, Reply


class Caller(NamedTuple):
    """Whose token it is, and what it may do: ``read`` or ``write``."""

    user: str
    role: str


class HubError(Exception):
    """A refusal, in the Hub's words.

    Args:
        status: HTTP status.
        message: For people; also the header ``X-Error-Message``.
        code: For programs: the header ``X-Error-Code``.
        headers: More of them.
    """

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{status}: {message}")
        coded = {"X-Error-Code": code} if code else {}
        named = {"X-Error-Message": message, **coded, **(headers or {})}
        body = Reply.of({"error": message}, status)
        self.reply = replace(body, headers={**body.headers, **named})


@dataclass
class HubState:
    """All that the double knows.

    Attributes:
        url: Of the API and of small files.
        storage_url: Of large files: another origin, as on the Hub, which gets no tokens.
        tokens: Token to whose it is.
        repos: By id.
        page_size: How many entries of a list are sent at once.
        unknown: Requests that nothing here answers.
        granted: Repo and hash to size of the large files that may be uploaded.
        secret: What the links to the storage are signed with.
        lock: Held while a request is answered.
    """

    url: str = ""
    storage_url: str = ""
    tokens: dict[str, Caller] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    page_size: int = 1000
    unknown: list[str] = field(default_factory=list)
    granted: dict[tuple[str, str], int] = field(default_factory=dict)
    secret: str = field(default_factory=secrets.token_hex)
    lock: RLock = field(default_factory=RLock)

    def caller(self, call: Call) -> Caller | None:
        """Who calls; None for nobody in particular.

        Raises:
            HubError: 401, the token is not valid.
        """
        header = call.headers.get("authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def known_caller(self, call: Call) -> Caller:
        """Who calls.

        Raises:
            HubError: 401, nobody in particular.
        """
        caller = self.caller(call)
        if caller is None:
            raise HubError(401, "Invalid username or password.")
        return caller

    def readable(self, call: Call) -> Repo:
        """The repo of the call, which its caller may read.

        Raises:
            HubError: There is no such repo, as far as this caller may know. Without a token that
                is 401. The Hub adds no code to it, as the client guesses what is meant, but only
                when the address starts with https.
        """
        caller = self.caller(call)
        repo = self.repos.get(call.parts["repo"])
        if repo and (not repo.private or (caller and caller.user == repo.owner)):
            if repo.gated and caller is None:
                raise HubError(401, "Access to this repository is restricted.", "GatedRepo")
            return repo
        if caller is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writable(self, call: Call) -> Repo:
        """The repo of the call, which its caller may change.

        Raises:
            HubError: As in `readable`; 401 without a token; 403 if it may only be read.
        """
        repo = self.readable(call)
        self.check_may_write(self.known_caller(call), repo.owner)
        return repo

    def check_may_write(self, caller: Caller, owner: str) -> None:
        """Check that a caller may change what belongs to a user.

        Raises:
            HubError: 403.
        """
        if caller.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if caller.user != owner:
            raise HubError(403, f'You don\'t have the required permissions in "{owner}".')

    def commit(self, repo: Repo, call: Call) -> Commit:
        """The commit that the call's revision names.

        Raises:
            HubError: 404, there is none.
        """
        revision = call.parts.get("revision", MAIN)
        try:
            return repo.at(revision)
        except KeyError:
            message = f"Invalid rev id: {revision}"
            raise HubError(404, message, "RevisionNotFound") from None

    def page(self, call: Call, items: Sequence[Any]) -> Reply:
        """The part of a list that the call asks for, with a link to the next part."""
        start = int(call.query.get("cursor", 0))
        end = start + self.page_size
        reply = Reply.of(items[start:end], X_Total_Count=str(len(items)))
        if end >= len(items):
            return reply
        query = urlencode({**call.query, "cursor": end})
        link = f'<{self.url}{call.path}?{query}>; rel="next"'
        return replace(reply, headers={**reply.headers, "Link": link})

    def storage_link(self, method: str, repo: Repo, sha256: str, filename: str = "") -> str:
        """Where a large file is put or got, which is all that this link allows."""
        query = {"signature": self.signature(method, repo.repo_id, sha256)}
        if filename:
            query["filename"] = filename
        return f"{self.storage_url}/lfs/{repo.repo_id}/{sha256}?{urlencode(query, quote_via=quote)}"

    def signature(self, method: str, repo_id: str, sha256: str) -> str:
        """What proves that a link to the storage is the double's own."""
        signed = f"{self.secret} {method} {repo_id} {sha256}"
        return hashlib.sha256(signed.encode()).hexdigest()[:20]


Route = Callable[[HubState, Call], Reply]


class Routes:
    """Which function answers which requests.

    In a pattern, ``{repo}`` is two parts of the path, ``{path}`` any number, ``{kind}`` one of
    models and datasets, and other names one.
    """

    def __init__(self) -> None:
        self._table: list[tuple[str, re.Pattern[str], Route]] = []

    def __call__(self, method: str, pattern: str) -> Callable[[Route], Route]:
        """Register the decorated function."""

        def register(function: Route) -> Route:
            self._table.append((method, re.compile(_expression(pattern)), function))
            return function

        return register

    def join(self, other: "Routes") -> None:
        """Answer what the other one answers, too."""
        self._table += other._table

    def answer(self, state: HubState, call: Call) -> Reply:
        """Answer a call; what no function is for is written down as unknown."""
        for method, pattern, function in self._table:
            match = pattern.fullmatch(call.path)
            if match and method == call.method:
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                with state.lock:
                    return function(state, replace(call, parts=parts))
        state.unknown.append(f"{call.method} {call.path}")
        return HubError(HTTPStatus.NOT_FOUND, "Sorry, there is no such page.").reply


def _expression(pattern: str) -> str:
    """A regular expression; square brackets enclose what may be absent."""
    several = {"repo": "[^/]+/[^/]+", "path": ".+", "kind": "models|datasets"}

    def part(name: re.Match[str]) -> str:
        return f"(?P<{name[1]}>{several.get(name[1], '[^/]+')})"

    pattern = pattern.replace(".", r"\.").replace("[", "(?:").replace("]", ")?")
    return re.sub(r"{(\w+)}", part, pattern)


def lines(body: bytes) -> Iterator[bytes]:
    """The lines of a body that are not empty."""
    return (line for line in body.split(b"\n") if line.strip())
