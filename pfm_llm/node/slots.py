"""Slots: the numbers by which a server knows the clients of a node.

Who has which number is drawn once and kept in the node's private folder. A number says nothing of
its user, and another federation gets other numbers.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pfm_llm.base.errors import CorruptFileError, NodeRefused
from pfm_llm.base.files import read_json, write_json
from pfm_llm.protocol.refusals import NodeRefusal

_SLOTS, _ASKED, _LEFT = "slots.json", "asked.json", "left.json"
_NOBODY = ""
_Kept = TypeVar("_Kept", list[str], dict[str, str])


class Slots:
    """The secret order of the clients of a federation.

    Args:
        folder: The federation's folder at this node. Clients that it does not know yet are added
            behind the others, in a random order.
        client_ids: The clients that can train.

    Raises:
        CorruptFileError: The kept order is damaged.
        StorageError: It cannot be read or written.
    """

    def __init__(self, folder: Path, client_ids: Sequence[str]) -> None:
        self._path = folder / _SLOTS
        self._clients: list[str] = _read(self._path, list, str)
        new = sorted(set(client_ids).difference(self._clients))
        secrets.SystemRandom().shuffle(new)
        if new:
            self._clients += new
            write_json(self._path, self._clients)
        self._present = set(client_ids)

    def __len__(self) -> int:
        return len(self._clients)

    def clients(self, slots: Sequence[int]) -> dict[str, int]:
        """Client to slot, for those of some slots that can train.

        Args:
            slots: Numbers, each once. One of a client that has left is passed over.

        Raises:
            NodeRefused: There is no such slot, or one comes twice.
        """
        if len(set(slots)) != len(slots) or any(not 0 <= slot < len(self) for slot in slots):
            raise NodeRefused(NodeRefusal.SLOTS, f"of {len(self)} slots not all of {slots!r:.200}")
        found = {self._clients[slot]: slot for slot in slots}
        return {client: slot for client, slot in found.items() if client in self._present}

    def forget(self, client_id: str) -> None:
        """Pass a client over from now on, and keep its slot without its id.

        Raises:
            StorageError: The order cannot be written.
        """
        self._present.discard(client_id)
        if client_id in self._clients:
            clients = [_NOBODY if client == client_id else client for client in self._clients]
            write_json(self._path, clients)
            self._clients = clients


class AskedRounds:
    """Which slots each round has asked for: the difference of two sums would be an update.

    A round may be asked again, as after a lost answer, and then for the same slots alone.

    Args:
        folder: The federation's folder at this node.

    Raises:
        CorruptFileError: The kept rounds are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _ASKED
        self._rounds: dict[str, str] = _read(self._path, dict, str)

    def ask(self, round_number: int, slots: Sequence[int]) -> None:
        """Note the slots of a round.

        Raises:
            NodeRefused: The round was asked for other slots before.
            StorageError: It cannot be noted.
        """
        digest = hashlib.sha256(json.dumps(sorted(slots)).encode()).hexdigest()
        key = str(round_number)
        if self._rounds.get(key, digest) != digest:
            raise NodeRefused(NodeRefusal.ROUND, f"round {key} was asked for other slots before")
        if key not in self._rounds:
            rounds = {**self._rounds, key: digest}
            write_json(self._path, rounds)
            self._rounds = rounds


class Left:
    """The clients that have left the node. It keeps hashes, and no id.

    Args:
        folder: The node's private folder.

    Raises:
        CorruptFileError: The kept hashes are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LEFT
        self._hashes: list[str] = _read(self._path, list, str)

    def __contains__(self, client_id: str) -> bool:
        return any(_matches(client_id, kept) for kept in self._hashes)

    def add(self, client_id: str) -> None:
        """Note a client.

        Raises:
            StorageError: It cannot be noted.
        """
        if client_id not in self:
            salt = secrets.token_hex(16)
            hashes = [*self._hashes, f"{salt}:{_salted(salt, client_id)}"]
            write_json(self._path, hashes)
            self._hashes = hashes


def _matches(client_id: str, kept: str) -> bool:
    salt, _, digest = kept.partition(":")
    return secrets.compare_digest(digest, _salted(salt, client_id))


def _salted(salt: str, client_id: str) -> str:
    return hashlib.sha256(f"{salt}/{client_id}".encode()).hexdigest()


def _read(path: Path, kind: type[_Kept], of: type) -> _Kept:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return kind()
    values = found.values() if isinstance(found, dict) else found
    if not isinstance(found, kind) or not all(isinstance(value, of) for value in values):
        raise CorruptFileError(f"{path} is damaged; restore it from a backup")
    return found
