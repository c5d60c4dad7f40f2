"""The nodes of a federation: what carries calls to them, and who takes part.

A `Link` carries the calls to the nodes: in this process, over sockets, or by an engine such as
Flower. A node takes part once it has been invited and agrees; see `protocol.agreement`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from pfm_llm.base.errors import NodeRefused
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.protocol.messages import AboutReply, Message
from pfm_llm.protocol.refusals import NodeRefusal

_log = logging.getLogger(__name__)
_INVITED_AGAIN = (NodeRefusal.NOT_READY, NodeRefusal.AGREEMENT)
"""What a node says that was restarted, or has taken part in another federation meanwhile."""
_BEGINNINGS = ("train", "advertise", "evaluate")
"""Calls that a node can answer which has just been invited."""

Answer = Message | NodeRefused


class Link(Protocol):
    """Carries calls to nodes."""

    @property
    def nodes(self) -> Sequence[str]:
        """The names of the nodes, such as ``n01``; the server's operator gives them."""
        ...

    def ask(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        """Send each node its request, all at once, and wait for the answers.

        Args:
            call: A key of `protocol.calls.CALLS`.
            requests: Node to request.

        Returns:
            Node to its answer of the call's type, or to its refusal. A node that cannot be reached,
            or does not answer in time, is left out.
        """
        ...


def meet(side: ServerSide, link: Link, nodes: Sequence[str]) -> dict[str, AboutReply]:
    """Invite nodes to a federation.

    Args:
        side: The server's side.
        link: Reaches the nodes.
        nodes: Some of the link's.

    Returns:
        Node to what it tells of itself, for each node that takes part.
    """
    found = _invite(side, link, nodes)
    return {node: reply for node, reply in found.items() if isinstance(reply, AboutReply)}


def ask_members(
    side: ServerSide, link: Link, call: str, requests: Mapping[str, Message]
) -> dict[str, Answer]:
    """Ask nodes; one that was restarted is invited again, and asked again if the call allows it.

    Args:
        side: The server's side.
        link: Reaches the nodes.
        call: A key of `protocol.calls.CALLS`.
        requests: Node to request.

    Returns:
        As `Link.ask`. A node that was invited again and takes no part has the refusal that says
        why.
    """
    answers = dict(link.ask(call, requests))
    again = [
        node
        for node, answer in answers.items()
        if isinstance(answer, NodeRefused) and answer.code in _INVITED_AGAIN
    ]
    if again and call in _BEGINNINGS:
        _log.info("inviting again: %s", ", ".join(again))
        found = _invite(side, link, again)
        answers |= {node: one for node, one in found.items() if isinstance(one, NodeRefused)}
        back = [node for node in found if not isinstance(found[node], NodeRefused)]
        answers |= link.ask(call, {node: requests[node] for node in back})
    return answers


def _invite(
    side: ServerSide, link: Link, nodes: Sequence[str]
) -> dict[str, AboutReply | NodeRefused]:
    """Node to what it tells of itself, or to why it takes no part; left out without an answer."""
    found: dict[str, AboutReply | NodeRefused] = {}
    answers = link.ask("about", dict.fromkeys(nodes, side.invitation))
    for node in nodes:
        answer = answers.get(node)
        if isinstance(answer, AboutReply):
            found[node] = _agreeing(side, node, answer)
            continue
        _log.warning("node %s: %s", node, "no answer" if answer is None else answer)
        if isinstance(answer, NodeRefused):
            found[node] = answer
    return found


def _agreeing(side: ServerSide, node: str, answer: AboutReply) -> AboutReply | NodeRefused:
    """The answer of a node that agrees; the refusal of one that does not."""
    apart = answer.agreed.value.difference(side.agreement) if answer.agreed else "everything"
    if apart:
        _log.warning("node %s (pfm_llm %s) differs in: %s", node, answer.version, apart)
        return NodeRefused(NodeRefusal.AGREEMENT)
    if answer.dtype != side.dtype:
        _log.warning(
            "node %s computes in %s, the server in %s: its updates are a little noisier",
            *(node, answer.dtype, side.dtype),
        )
    return answer
