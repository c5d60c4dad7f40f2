"""The socket of a worker. One request at a time; nothing that comes in can end the process."""

import contextlib
import grp
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pfm_llm.base.errors import ConfigError, NodeRefused, StorageError
from pfm_llm.base.files import make_private_dir, storage_errors
from pfm_llm.base.locks import locked
from pfm_llm.node.frames import Closed, parse_header, receive_frame, send_frame
from pfm_llm.node.site import SiteConfig
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.calls import OF_THE_OWNER
from pfm_llm.protocol.refusals import NodeRefusal

_log = logging.getLogger(__name__)
READ_SECONDS = 30.0
"""A peer that sends or reads nothing for so long is dropped, so that others get their turn."""
_POLL_SECONDS = 0.2
_LONGEST_PATH = 100
"""Bytes of a socket's path that all systems take."""
_ROOT = 0
_CREDENTIALS = struct.Struct("3i")
"""Of a peer: the numbers of its process, user and group (Linux, ``man 7 unix``)."""


class Stop:
    """Ends a server after the request under way, whose private states are then in the store."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Stop; also a handler of signals."""
        self.is_set = True

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server during the block."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.set) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(worker: Worker, site: SiteConfig, stop: Stop) -> None:
    """Answer calls at the site's socket until stopped.

    Args:
        worker: Answers.
        site: Where the socket is and who may connect.
        stop: Looked at between requests.

    Raises:
        ConfigError: The socket's path is too long, or its group does not exist.
        BusyError: Another worker serves this folder.
        StorageError: The socket cannot be made.
    """
    busy = f"another worker serves {site.root}; stop it first"
    with locked(make_private_dir(site.root) / "node.lock", busy), _listening(site) as listener:
        _log.info("listening at %s", site.socket_path)
        while not stop.is_set:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(READ_SECONDS)
                _answer_all(worker, connection, site.max_message_bytes, stop)
    _log.info("stopped; private states are in %s", site.root)


@contextlib.contextmanager
def _listening(site: SiteConfig) -> Iterator[socket.socket]:
    path, group = site.socket_path, _group_of(site)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"{path} is longer than the {_LONGEST_PATH} bytes of a socket's path; set socket.path"
        )
    with storage_errors(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _make_folder(path.parent, group)
        if path.is_symlink() or (path.exists() and not path.is_socket()):
            raise StorageError(f"{path} is there and is no socket; move it away")
        path.unlink(missing_ok=True)  # of a worker that was killed; the lock says that it is gone
        before = os.umask(0o177)  # so that the socket is never open to others, not even at first
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        listener.listen()
        listener.settimeout(_POLL_SECONDS)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _make_folder(folder: Path, group: int | None) -> None:
    """The socket's folder, 0700; with a group 0750, which lets its members pass."""
    make_private_dir(folder)
    if group is not None:
        os.chown(folder, -1, group)
        folder.chmod(0o750)


def _group_of(site: SiteConfig) -> int | None:
    if site.socket.group is None:
        return None
    try:
        return grp.getgrnam(site.socket.group).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"socket.group: there is no group {site.socket.group!r}; make it with groupadd"
        ) from error


def _answer_all(worker: Worker, connection: socket.socket, max_body: int, stop: Stop) -> None:
    """Answer the frames of one connection until its end. After a refused frame it is closed."""
    while not stop.is_set:
        try:
            header, body = receive_frame(connection, max_body)
        except Closed:
            return
        except NodeRefused as refused:
            _refuse(connection, refused)
            return
        except OSError as error:
            _log.warning("a peer is gone or too slow: %s", error)
            return
        if not _answer(worker, connection, header, body, max_body):
            return


def _answer(
    worker: Worker, connection: socket.socket, header: bytes, body: bytes, max_body: int
) -> bool:
    """Answer one frame; whether the peer is still there."""
    try:
        request = parse_header(header)
        call, message = request.get("call"), json.dumps(request.get("message", {})).encode()
        if not isinstance(call, str):
            raise NodeRefused(NodeRefusal.MALFORMED, "a request without a call")
        if call in OF_THE_OWNER:
            _check_owner(connection, call)
        found, tensors = worker.answer(call, message, body)
        if len(tensors) > max_body:
            raise NodeRefused(NodeRefusal.TOO_LARGE, f"an answer of {len(tensors)} bytes")
    except NodeRefused as refused:
        return _refuse(connection, refused)
    return _send(connection, b'{"message": %s}' % found, tensors)


def _check_owner(connection: socket.socket, call: str) -> None:
    """Refuse a peer that is another user of the system than the worker; root may be the owner."""
    user = _user_of(connection)
    if user not in (os.geteuid(), _ROOT):
        who = "unknown" if user is None else f"user {user} of the system"
        raise NodeRefused(
            NodeRefusal.NOT_ALLOWED,
            f"{call} came from {who}; only user {os.geteuid()}, who runs the worker, and root may",
        )


def _user_of(connection: socket.socket) -> int | None:
    """The user whose process connected, as the kernel noted; None where it notes nobody."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    noted = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(noted)[1])


def _refuse(connection: socket.socket, refused: NodeRefused) -> bool:
    _log.warning("refused (%s): %s", refused.code, refused)
    return _send(connection, json.dumps({"refused": refused.code}).encode(), b"")


def _send(connection: socket.socket, header: bytes, body: bytes) -> bool:
    try:
        send_frame(connection, header, body)
    except OSError as error:
        _log.warning("a peer has gone before its answer: %s", error)
        return False
    return True
