"""Links to nodes without an engine: workers in this process."""

from collections.abc import Mapping, Sequence

from pfm_llm.base.errors import NodeRefused
from pfm_llm.federation.nodes import Answer
from pfm_llm.node.worker import Worker
from pfm_llm.protocol.messages import CALLS, Message, decode, encode


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
