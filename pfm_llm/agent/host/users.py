"""The users of a host: each with a token, a folder of their own, and an agent that opens no other.

Whose agent a request reaches follows from its token, and from nothing else in it. No request names
a user or a folder, so that there is nothing to guess. Of a token the host keeps the SHA-256 alone.
"""

import hashlib
import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.locks import locked
from pfm_llm.recommender import Recommender

USERS = "users.json"
_TOKEN_BYTES = 32
_FOLDER_BYTES = 16
_FOLDER = r"[0-9a-f]{32}"


class Users:
    """Agents by token; those that were used least recently are closed.

    Args:
        root: The folder of all users. It becomes 0700.
        model: The recommender of all.
        most_open: How many agents are kept in memory, with what they have read off their histories.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, root: Path, model: Recommender, most_open: int = 256) -> None:
        self._root = files.make_private_dir(root)
        self._model = model
        self._most_open = most_open
        self._open: OrderedDict[str, PersonalAgent] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str) -> str:
        """Make a user; the token that is returned is kept nowhere.

        Args:
            name: For the operator alone, who removes the user by it.

        Raises:
            DataError: There is such a user.
        """
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._locked():
            users = self._users()
            if any(user["name"] == name for user in users.values()):
                raise DataError(f"there is a user {name!r} already; remove them first")
            users[_hash(token)] = {"name": name, "folder": secrets.token_hex(_FOLDER_BYTES)}
            files.write_json(self._root / USERS, users)
        return token

    def remove(self, name: str) -> None:
        """Delete a user with all that is kept of them.

        Raises:
            DataError: There is no such user.
        """
        with self._locked():
            users = self._users()
            key = next((key for key, user in users.items() if user["name"] == name), None)
            if key is None:
                raise DataError(f"there is no user {name!r}")
            with self._lock:
                self._open.pop(key, None)
            self._opened(users.pop(key)["folder"]).forget()
            files.write_json(self._root / USERS, users)

    def agent(self, token: str) -> PersonalAgent | None:
        """The agent of a token; None: nobody has it."""
        key = _hash(token)
        user = self._users().get(key)
        if user is None:
            return None
        with self._lock:
            agent = self._open.pop(key, None) or self._opened(user["folder"])
            self._open[key] = agent
            while len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return agent

    @property
    def num_open(self) -> int:
        """How many agents are in memory."""
        return len(self._open)

    def _opened(self, folder: str) -> PersonalAgent:
        return PersonalAgent(self._model, self._root / folder)

    def _users(self) -> dict[str, Any]:
        path = self._root / USERS
        try:
            found = files.read_json(path)
        except FileNotFoundError:
            return {}
        is_good = isinstance(found, dict) and all(map(_is_user, found.values()))
        if not is_good:
            raise CorruptFileError(f"{path} is no list of users; restore it from a backup")
        return dict(found)

    def _locked(self) -> Any:
        return locked(self._root / ".lock", f"waiting for another process at {self._root}", True)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _is_user(entry: Any) -> bool:
    """Whether an entry names a folder that `Users.add` may have made, and no other place."""
    if not isinstance(entry, dict) or entry.keys() != {"name", "folder"}:
        return False
    folder = entry["folder"]
    return isinstance(folder, str) and re.fullmatch(_FOLDER, folder) is not None
