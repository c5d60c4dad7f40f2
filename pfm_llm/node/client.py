"""The client of a node's socket, for a process that is started for each message.

It imports the standard library alone: headers and bodies pass through as bytes. A test holds that
neither torch nor numpy nor transformers is imported.
"""

import json
import socket
from pathlib import Path

from pfm_llm.base.errors import NodeError, NodeRefused
from pfm_llm.node.frames import Closed, parse_header, receive_frame, send_frame
from pfm_llm.protocol.refusals import NodeRefusal

MAX_BODY = 256 * 10**6
CONNECT_SECONDS = 10.0


class NodeClient:
    """Calls to the worker behind a socket; each call is a connection of its own.

    Args:
        path: The socket.
        timeout: Seconds that a call may take; None: as long as it takes. A worker answers one call
            at a time, so a call may wait for another one.
        max_body: Bound on the tensors of an answer, in bytes.
    """

    def __init__(
        self, path: str | Path, timeout: float | None = None, max_body: int = MAX_BODY
    ) -> None:
        self._path = str(path)
        self._timeout = timeout
        self._max_body = max_body

    def call(self, name: str, header: bytes = b"{}", body: bytes = b"") -> tuple[bytes, bytes]:
        """One call.

        Args:
            name: ``about``, ``train``, ``evaluate`` or ``forget``.
            header: JSON of the request; see `pfm_llm.protocol.messages`.
            body: Its tensors as safetensors; empty: none.

        Returns:
            JSON and tensors of the answer.

        Raises:
            NodeRefused: The node refuses; ``code`` says why.
            NodeError: There is no worker at the socket, it does not answer in time, or what came
                back is no answer.
        """
        request = b'{"call": %s, "message": %s}' % (json.dumps(name).encode(), header)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(CONNECT_SECONDS)
                connection.connect(self._path)
                connection.settimeout(self._timeout)
                send_frame(connection, request, body)
                found, tensors = receive_frame(connection, self._max_body)
            answer = parse_header(found)
        except (Closed, OSError) as error:
            reason = "it closed the connection" if isinstance(error, Closed) else error
            raise NodeError(
                f"no answer from a node at {self._path} ({reason}); start it with "
                "`pfm node serve site.yaml`"
            ) from error
        except NodeRefused as error:
            raise NodeError(f"{self._path} does not answer as a node does: {error}") from error
        if "refused" in answer:
            raise NodeRefused(_code(answer["refused"]))
        if "message" not in answer:
            raise NodeError(f"{self._path} does not answer as a node does: no message in it")
        return json.dumps(answer["message"]).encode(), tensors


def _code(value: object) -> str:
    """A code of the list; a newer node may have others."""
    return value if value in list(NodeRefusal) else NodeRefusal.FAILED  # type: ignore[return-value]
