"""Calls to the Hub: retries, and a remedy for every error of the client.

The client (`huggingface_hub`) retries downloads, uploads and lists itself. It makes all other calls
only once (repositories, branches, tags and commits); `retried` is for those.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from pfm_llm import __version__
from pfm_llm.base import files
from pfm_llm.base.errors import HubError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further try."""
PUSHING = "push to"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST_WAIT = 60.0
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
UNREACHABLE = (httpx2.TransportError, ConnectionError, TimeoutError)
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


def hub_api() -> HfApi:
    """The client, for the endpoint in its current settings."""
    return HfApi(library_name="pfm_llm", library_version=__version__)


def check_repo_id(repo: str) -> None:
    """Check the form of a repository's name.

    Raises:
        HubError: The name has not the form ``user/name``.
    """
    if not _REPO_ID.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise HubError(
            f"{repo!r} is no repository of the Hub: write user/name, with letters, digits, "
            "-, _ and . between them"
        )


def check_login(repo: str) -> None:
    """Check what a push needs and can be known without the network.

    Raises:
        HubError: The repository's name is wrong, nobody is logged in, or the client is offline.
    """
    check_repo_id(repo)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot {PUSHING} {repo}: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise HubError(f"cannot {PUSHING} {repo}: nobody is logged in; {_LOG_IN}")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an error, if it has one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def is_passing(error: BaseException | None) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, RevisionResolutionError):
        error = error.__cause__
    if isinstance(error, httpx2.ProxyError | httpx2.UnsupportedProtocol):
        return False
    # The client parses the answer about a card before it looks at its status.
    return status_of(error) in _PASSING_STATUS or isinstance(
        error, httpx2.TransportError | json.JSONDecodeError
    )


def is_cut(error: BaseException | None) -> bool:
    """Whether a download was reset in the middle; the client does not retry this."""
    return isinstance(error, httpx2.ReadError)


def retried(
    call: Callable[[], Result], passing: Callable[[BaseException], bool] = is_passing
) -> Result:
    """Make a call, and repeat it after growing waits while its errors are temporary.

    Args:
        call: The call, which may be made more than once.
        passing: Whether an error is temporary. The error of the last try is always raised.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            pause(error, wait)
    return call()


def pause(error: BaseException, wait: float) -> None:
    """Wait before another try, as long as the Hub asks for, up to a limit."""
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        wait = max(wait, min(float(asked), _LONGEST_WAIT)) if asked.isdigit() else wait
    _log.warning("the Hub: %s; trying again in %g s", _first_line(error), wait)
    time.sleep(wait)


@contextlib.contextmanager
def hub_errors(repo: str, what: str) -> Iterator[None]:
    """Turn what the client raises into a `HubError` with a remedy.

    Args:
        repo: The repository.
        what: The action of the block, such as "pull" or "push to", for the message.

    Raises:
        HubError: The Hub refused, or cannot be reached.
        StorageError: The client could not write its cache.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _explained(error, repo, what) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, UNREACHABLE):
            with files.storage_errors(Path(error.filename or constants.HF_HUB_CACHE)):
                raise
        raise _explained(error, repo, what) from error
    except (
        httpx2.HTTPError,
        EntryNotFoundError,
        RevisionResolutionError,
        RuntimeError,
        ValueError,
    ) as error:
        raise _explained(error, repo, what) from error


def _explained(error: Exception, repo: str, what: str) -> HubError:
    cause = _cause(error)
    reason = _answered(cause, repo) if isinstance(cause, HfHubHTTPError) else _unanswered(cause)
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError):
        reason += "; no whole copy of it was pulled before"
    lost = is_passing(cause) or isinstance(cause, UNREACHABLE)
    if what == PUSHING and lost:
        reason += "; what was uploaded is kept, the next push sends the rest"
    if what == PUSHING and isinstance(cause, UNREACHABLE):
        reason += " (--dry-run needs no network)"
    return HubError(f"cannot {what} {repo}: {reason}")


def _cause(error: BaseException) -> BaseException:
    """The error that the client wrapped, of a failed upload or of a missing cached copy."""
    wrappers = (LocalEntryNotFoundError, RevisionResolutionError, RuntimeError)
    while isinstance(error, wrappers) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _unanswered(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, and run again"
    if isinstance(error, UNREACHABLE):
        return (
            f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)}); "
            "look at the connection, and run again"
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in; {_LOG_IN}"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub's answer is not JSON; run again later"
    return " ".join(str(error).split()) or type(error).__name__


def _answered(error: HfHubHTTPError, repo: str) -> str:
    said = f" (the Hub: {error.server_message.strip()})" if error.server_message else ""
    status = error.response.status_code
    if status == 401:
        return _not_logged_in(error) + said
    if isinstance(error, GatedRepoError):
        return f"it is gated; ask for access at {constants.ENDPOINT}/{repo}{said}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and not yours to see; check its name, "
            f"and with `hf auth whoami` whose token this is{said}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            "it has no such commit, tag or branch; "
            f"`pfm versions list {repo}` shows what it has{said}"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"it has no such file{said}"
    if status in _REMEDIES:
        remedy = _REMEDIES[status].format(owner=repo.split("/")[0])
        return f"{remedy}{said}"
    if status >= 500:
        return f"the Hub has a fault of its own (status {status}); run again later{said}"
    return f"the Hub refuses (status {status}){said or f': {_first_line(error)}'}"


def _not_logged_in(error: HfHubHTTPError) -> str:
    if "authorization" in error.response.request.headers:
        return f"the Hub does not know the token (wrong, or expired); {_LOG_IN} to a valid one"
    return (
        f"nobody is logged in, and without a token a private repository looks like none; {_LOG_IN}"
    )


_REMEDIES = {
    403: "the token may not do this: it takes one with write access to {owner}, from "
    "https://huggingface.co/settings/tokens; `hf auth whoami` says whose this one is",
    409: "it conflicts with what is there; see `pfm versions list`, and run again "
    "if another push was under way",
    412: "somebody else has pushed in the meantime; run again to go on from theirs",
    413: "a file is larger than the Hub takes",
    429: "the Hub has had too many requests from here; wait a few minutes, and run again",
}


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
