"""The double itself: two ports, what goes wrong on them, and a log of all that was asked."""

import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Self

from tests.support.hub_double import api, contents
from tests.support.hub_double.state import Caller, HubError, HubState, Routes
from tests.support.hub_double.store import MAIN, Repo
from tests.support.hub_double.wire import Call, Fault, Faults, Listener, Reply, Request

OWNER = "alice"
WRITE_TOKEN = "hf_alice_may_write"
READ_TOKEN = "hf_alice_may_read"
OTHER_TOKEN = "hf_bob_may_write"

_ROUTES = Routes()
_ROUTES.join(api.route)
_ROUTES.join(contents.route)


class HubDouble:
    """A Hub on the loopback device, from ``with`` to the end of its block.

    It has models, and data sets that `put` brings; no pull requests, no Xet, no multipart uploads,
    no rules of .gitignore; what it does not know is answered with 404 or 501, and the former is
    written down.

    Attributes:
        url: The endpoint.
        storage_url: Where large files are: another origin, as on the Hub.
        home: A folder for the client's caches, which is removed at the end.
        tokens: Token to user and role; two of `OWNER`, one of another user.
        requests: All that was asked, in the order of the answers.
        unknown: Requests that nothing here answers.
        errors: Tracebacks of the double's own failures, which clients see as status 500.
        waits: Seconds that a client in this process would have waited before its retries.
        page_size: How many entries of a list are sent at once.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.waits: list[float] = []
        self.tokens = {
            WRITE_TOKEN: Caller(OWNER, "write"),
            READ_TOKEN: Caller(OWNER, "read"),
            OTHER_TOKEN: Caller("bob", "write"),
        }
        self._state = HubState(tokens=self.tokens)
        self.unknown = self._state.unknown
        self._faults = Faults()
        self._folder = tempfile.TemporaryDirectory(prefix="hub-double-")
        self.home = Path(self._folder.name)

    def __enter__(self) -> Self:
        log = self.requests.append
        self._listeners = [
            Listener(lambda call: self._answer(_ROUTES, call), self._faults, log),
            Listener(lambda call: self._answer(contents.storage_route, call), self._faults, log),
        ]
        self.url, self.storage_url = (listener.url for listener in self._listeners)
        self._state.url, self._state.storage_url = self.url, self.storage_url
        for listener in self._listeners:
            listener.errors = self.errors
            # It looks this often whether it is to end.
            Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._folder.cleanup()

    def close(self) -> None:
        """Go away: connections end, and new ones are refused."""
        while self._listeners:
            listener = self._listeners.pop()
            listener.shutdown()
            listener.server_close()

    @property
    def page_size(self) -> int:
        """How many entries of a list are sent at once."""
        return self._state.page_size

    @page_size.setter
    def page_size(self, size: int) -> None:
        self._state.page_size = size

    @property
    def repo_ids(self) -> list[str]:
        """The repos that there are."""
        return sorted(self._state.repos)

    def repo(self, repo_id: str) -> Repo:
        """A stored repo.

        Raises:
            KeyError: There is none.
        """
        return self._state.repos[repo_id]

    def put(self, repo_id: str, files: Mapping[str, bytes], branch: str = MAIN) -> str:
        """Commit files to a repo, of a data set for example, which is made if there is none.

        Returns:
            The commit.
        """
        repo = self._state.repos.setdefault(repo_id, Repo(repo_id))
        repo.branches.setdefault(branch, repo.branches[MAIN])
        tree = {**repo.at(branch).tree, **{name: repo.keep(files[name]) for name in files}}
        return repo.commit(branch, tree, "put").oid

    def asked(self, method: str, path_part: str = "") -> list[Request]:
        """The requests so far of a method, or ``*``, whose path contains a text."""
        return [
            request
            for request in self.requests
            if method in ("*", request.method) and path_part in request.path
        ]

    def fail_next(
        self,
        method: str,
        path_part: str,
        status: int,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """Let the next requests of a method whose path contains a text fail; they do nothing."""
        self._faults.add(Fault(method, path_part, times, Reply(status, headers or {}, body)))

    def drop_next(
        self,
        method: str,
        path_part: str,
        times: int = 1,
        after_bytes: int | None = None,
        done: bool = False,
        reset: bool = False,
    ) -> None:
        """Cut the connection of the next requests of a method whose path contains a text.

        Args:
            method: Such as ``GET``.
            path_part: The text.
            times: Of how many requests.
            after_bytes: After so many bytes of the request's body, or if it has none, of the
                answer's. None: before anything is done.
            done: The request is carried out, and its answer is lost.
            reset: With a reset, not with an orderly end.
        """
        self._faults.add(Fault(method, path_part, times, None, after_bytes, done, reset))

    def faults_left(self) -> list[Fault]:
        """What should have gone wrong, and has not yet as often."""
        return self._faults.left()

    def clear_faults(self) -> None:
        """Let nothing more go wrong."""
        self._faults.clear()

    def corrupt(self, repo_id: str, path: str, revision: str = MAIN) -> None:
        """Change one bit of a stored file that is not empty; its size and hash stay declared."""
        repo = self.repo(repo_id)
        key = repo.at(revision).tree[path].key
        content = bytearray(repo.blobs[key])
        content[len(content) // 2] ^= 1
        repo.blobs[key] = bytes(content)

    def environ(self, token: str = "") -> dict[str, str]:
        """The variables that make another process talk to the double, to add to its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",  # not the empty text: then TRANSFORMERS_OFFLINE is looked at
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_OIDC_RESOURCE": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def _answer(self, routes: Routes, call: Call) -> Reply:
        try:
            return routes.answer(self._state, call)
        except HubError as refused:
            return refused.reply
        except Exception:
            self.errors.append(traceback.format_exc())
            return HubError(500, "The double itself has failed.").reply
