"""Frames: how a message travels over the socket of a node. It imports the standard library alone.

::

    frame = 8 bytes: magic and version | u32: length of the header | u64: length of the body
            header: JSON | body: safetensors

All integers are big-endian. The header of a request is ``{"call": …, "message": {…}}``. That of an
answer is ``{"message": {…}}`` or ``{"refused": <code>}``. Lengths are compared with their bounds
before anything is read or allocated.
"""

import json
import socket
import struct
from typing import Any

from pfm_llm.base.errors import NodeRefused
from pfm_llm.protocol.refusals import NodeRefusal

MAGIC = b"PFMNODE"
VERSION = 1
MAX_HEADER = 4 * 10**6
"""Bytes of a header: a request names up to a million slots of at most seven digits."""
_PREFIX = struct.Struct(">7sBIQ")
_AT_ONCE = 1 << 20


class Closed(Exception):
    """The other side has closed the connection between two frames."""


def send_frame(connection: socket.socket, header: bytes, body: bytes) -> None:
    """Send one frame.

    Raises:
        OSError: The other side has gone, or does not read in time.
    """
    connection.sendall(_PREFIX.pack(MAGIC, VERSION, len(header), len(body)) + header)
    if body:
        connection.sendall(body)


def receive_frame(connection: socket.socket, max_body: int) -> tuple[bytes, bytes]:
    """Receive one frame.

    Args:
        connection: A connected socket.
        max_body: Bound on the body, in bytes.

    Returns:
        Header and body.

    Raises:
        Closed: Nothing came before the end of the connection.
        NodeRefused: It is no frame of this version, it ends too early, or it is too large.
        OSError: The connection broke, or nothing came in time.
    """
    prefix = _receive(connection, _PREFIX.size)
    if not prefix:
        raise Closed
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise NodeRefused(NodeRefusal.MALFORMED, "what came is no frame")
    _, version, header_size, body_size = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise NodeRefused(
            NodeRefusal.VERSION, f"a frame of version {version}, here it is {VERSION}"
        )
    if header_size > MAX_HEADER or body_size > max_body:
        raise NodeRefused(
            NodeRefusal.TOO_LARGE, f"a frame of {header_size} + {body_size} bytes, max {max_body}"
        )
    header, body = _receive(connection, header_size), _receive(connection, body_size)
    if len(header) < header_size or len(body) < body_size:
        raise NodeRefused(NodeRefusal.MALFORMED, "the frame ends too early")
    return header, body


def parse_header(header: bytes) -> dict[str, Any]:
    """The JSON object of a header.

    Raises:
        NodeRefused: It is none.
    """
    try:
        found = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise NodeRefused(NodeRefusal.MALFORMED, f"a header that is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise NodeRefused(NodeRefusal.MALFORMED, "a header that is no JSON object")
    return found


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the connection ends."""
    parts, missing = [], size
    while missing:
        part = connection.recv(min(missing, _AT_ONCE))
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
