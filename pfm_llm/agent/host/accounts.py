"""Who the users of a host are: each has a token and a folder of their own.

Whose agent a request reaches follows from its token, and from nothing else in it. No request names
a user or a folder, so that there is nothing to guess. Of a token the host keeps the SHA-256 alone.

Several processes may use one list, such as a server and an operator who removes a user. Whoever
works in a user's folder holds that user's lock meanwhile.
"""

import contextlib
import hashlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm.base import files
from pfm_llm.base.errors import AccessError, CorruptFileError, DataError
from pfm_llm.base.locks import locked

USERS = "users.json"
_TOKEN_BYTES = 32
_FOLDER_BYTES = 16
_FOLDER = r"[0-9a-f]{32}"
_KEY = r"[0-9a-f]{64}"
_BUSY = "waiting for another process that works on the same files"


@dataclass(frozen=True)
class Account:
    """A user of a host.

    Attributes:
        key: SHA-256 of the token, in hex.
        name: For the operator alone.
        folder: The folder of the user's agent.
    """

    key: str
    name: str
    folder: Path


class Accounts:
    """The list of users, in a file of the folder of all.

    Args:
        root: The folder of all users. It becomes 0700.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self._root = files.make_private_dir(root)
        self._last: tuple[tuple[int, ...], Mapping[str, Account]] = (), {}

    def add(self, name: str) -> str:
        """Make a user; the token that is returned is kept nowhere.

        Args:
            name: For the operator alone, who removes the user by it.

        Raises:
            DataError: There is such a user, or the name is empty.
        """
        if not name.strip():
            raise DataError("a user needs a name, by which the operator finds them again")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        with self._locked():
            found = self.by_key()
            if any(account.name == name for account in found.values()):
                raise DataError(f"there is a user {name!r} already; remove them first")
            folder = self._root / secrets.token_hex(_FOLDER_BYTES)
            account = Account(_hash(token), name, folder)
            self._write([*found.values(), account])
        return token

    def remove(self, name: str) -> None:
        """Delete a user with all that is kept of them, once their running requests are answered.

        Raises:
            DataError: There is no such user.
            StorageError: A file cannot be deleted; the user is still there.
        """
        with self._locked():
            found = self.by_key()
            account = next((one for one in found.values() if one.name == name), None)
            if account is None:
                raise DataError(f"there is no user {name!r}")
            with locked(self._lock_of(account), _BUSY, wait=True):
                with files.storage_errors(account.folder), contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(account.folder)
                self._write([one for one in found.values() if one is not account])
                self._lock_of(account).unlink(missing_ok=True)

    def find(self, token: str) -> Account | None:
        """The user of a token; None: nobody has it."""
        return self.by_key().get(_hash(token))

    @contextlib.contextmanager
    def held(self, account: Account) -> Iterator[None]:
        """Work in a user's folder: no other process and no other block does so meanwhile.

        Raises:
            AccessError: The user has been removed.
        """
        path = self._lock_of(account)
        with locked(path, _BUSY, wait=True):
            if account.key not in self.by_key():
                path.unlink(missing_ok=True)  # folders have new names, so nobody waits for it
                raise AccessError("there is no such user any more")
            yield

    def by_key(self) -> Mapping[str, Account]:
        """Every user by `Account.key`; the file is read again when it has changed.

        Raises:
            CorruptFileError: The file is no list of users.
        """
        path = self._root / USERS
        try:
            state = path.stat()
        except FileNotFoundError:
            return {}
        stamp = state.st_ino, state.st_mtime_ns, state.st_size
        last = self._last
        if last[0] != stamp:
            last = self._last = stamp, self._read(path)
        return last[1]

    def _read(self, path: Path) -> dict[str, Account]:
        found = files.read_json(path)
        if not isinstance(found, dict) or not all(_is_user(*entry) for entry in found.items()):
            raise CorruptFileError(f"{path} is no list of users; restore it from a backup")
        return {
            key: Account(key, user["name"], self._root / user["folder"])
            for key, user in found.items()
        }

    def _write(self, accounts: list[Account]) -> None:
        users = {one.key: {"name": one.name, "folder": one.folder.name} for one in accounts}
        files.write_json(self._root / USERS, users)

    def _lock_of(self, account: Account) -> Path:
        return self._root / f".{account.folder.name}.lock"

    def _locked(self) -> Any:
        return locked(self._root / ".lock", _BUSY, wait=True)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _is_user(key: str, entry: Any) -> bool:
    """Whether an entry names a folder that `Accounts.add` may have made, and no other place."""
    if re.fullmatch(_KEY, key) is None:
        return False
    if not isinstance(entry, dict) or entry.keys() != {"name", "folder"}:
        return False
    name, folder = entry["name"], entry["folder"]
    is_folder = isinstance(folder, str) and re.fullmatch(_FOLDER, folder) is not None
    return is_folder and isinstance(name, str)
