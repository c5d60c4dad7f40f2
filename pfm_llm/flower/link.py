"""A `Link` whose calls travel in Flower's messages."""

import logging
import time
from collections.abc import Mapping, Sequence

from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid

from pfm_llm.base.errors import NodeError, NodeRefused
from pfm_llm.federation.members import Answer
from pfm_llm.flower import wire
from pfm_llm.node.client import MAX_BODY
from pfm_llm.protocol.calls import CALLS
from pfm_llm.protocol.messages import Message, decode, encode

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
"""Flower's own `send_and_receive` looks every 3 seconds, which is longer than a small round."""


class FlowerLink:
    """Calls to SuperNodes by the names with which they were registered.

    A name belongs to a public key, so it survives restarts of the node and of the SuperLink.

    Args:
        grid: Flower's way to the SuperLink.
        nodes: The names.
        timeout: Seconds until a node that has not answered is left out.
        max_body: Bound on the tensors of an answer, in bytes.
    """

    def __init__(
        self, grid: Grid, nodes: Sequence[str], timeout: float, max_body: int = MAX_BODY
    ) -> None:
        self._grid, self._nodes = grid, list(nodes)
        self._timeout, self._max_body = timeout, max_body

    @property
    def nodes(self) -> Sequence[str]:
        """See `Link.nodes`."""
        return list(self._nodes)

    def wait(self, seconds: float) -> None:
        """Wait until all nodes are online, or for some seconds."""
        deadline = time.monotonic() + seconds
        while set(self._nodes) - self._online().keys() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def ask(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        """See `Link.ask`.

        Raises:
            NodeError: Two online nodes have the same name.
        """
        online = self._online()
        if away := sorted(requests.keys() - online.keys()):
            _log.warning("not online: %s", ", ".join(away))
        names = [node for node in requests if node in online]
        messages = [self._message(call, online[node], requests[node]) for node in names]
        pushed = zip(self._grid.push_messages(messages), names, strict=True) if messages else ()
        # None stands for a message that the SuperLink did not take.
        waiting = {number: node for number, node in pushed if number is not None}
        answers: dict[str, Answer] = {}
        deadline = time.monotonic() + self._timeout
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                if (answer := self._answer(call, node, reply)) is not None:
                    answers[node] = answer
            if waiting:
                time.sleep(_POLL_SECONDS)
        for node in waiting.values():
            _log.warning("node %s: no answer in %g s", node, self._timeout)
        return answers

    def _online(self) -> dict[str, int]:
        """Name to number of the online nodes that this link knows."""
        found: dict[str, int] = {}
        for info in self._grid.get_nodes():
            if info.name in found:
                raise NodeError(
                    f"two SuperNodes are registered as {info.name}; give each its own name"
                )
            if info.name in self._nodes:
                found[info.name] = info.node_id
        return found

    def _message(self, call: str, node_id: int, request: Message) -> FlowerMessage:
        content = wire.pack(*encode(request))
        return FlowerMessage(content, node_id, wire.MESSAGE_TYPES[call], ttl=self._timeout)

    def _answer(self, call: str, node: str, reply: FlowerMessage) -> Answer | None:
        """The answer of a node; None where its worker has not seen the request."""
        if reply.has_error():
            # The text may be the node's, and says nothing that the code does not.
            _log.warning("node %s: Flower's error code %d", node, reply.error.code)
            return None
        try:
            return decode(CALLS[call][1], *wire.unpack(reply.content, self._max_body))
        except wire.NoWorker:
            _log.warning("node %s: its worker cannot be reached", node)
            return None
        except NodeRefused as refused:
            return refused
