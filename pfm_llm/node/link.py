"""Links to nodes without an engine: workers in this process, or behind sockets of this machine."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pfm_llm.base.errors import NodeError, NodeRefused
from pfm_llm.federation.members import Answer
from pfm_llm.node.client import NodeClient
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.calls import CALLS
from pfm_llm.protocol.messages import Message, decode, encode

_log = logging.getLogger(__name__)


class LocalLink:
    """Workers in this process. All that they are asked and answer goes through bytes.

    Args:
        workers: Name of a node to its worker.
    """

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = dict(workers)

    @property
    def nodes(self) -> Sequence[str]:
        """See `Link.nodes`."""
        return list(self._workers)

    def ask(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        """See `Link.ask`; one after another."""
        answers: dict[str, Answer] = {}
        for node, request in requests.items():
            try:
                found = self._workers[node].answer(call, *encode(request))
                answers[node] = decode(CALLS[call][1], *found)
            except NodeRefused as refused:
                answers[node] = NodeRefused(refused.code)
        return answers


class SocketLink:
    """Workers behind sockets, all asked at once.

    Args:
        clients: Name of a node to the client of its socket.
    """

    def __init__(self, clients: Mapping[str, NodeClient]) -> None:
        self._clients = dict(clients)

    @property
    def nodes(self) -> Sequence[str]:
        """See `Link.nodes`."""
        return list(self._clients)

    def ask(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        """See `Link.ask`."""
        if not requests:
            return {}

        def one(node: str) -> Answer | None:
            try:
                found = self._clients[node].call(call, *encode(requests[node]))
                return decode(CALLS[call][1], *found)
            except NodeRefused as refused:
                return refused
            except NodeError as error:
                _log.warning("node %s: %s", node, error)
                return None

        with ThreadPoolExecutor(len(requests)) as pool:
            answers = zip(requests, pool.map(one, requests), strict=True)
            return {node: answer for node, answer in answers if answer is not None}
