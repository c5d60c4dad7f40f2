"""The server's side of a round under masks between nodes: it learns the sum over all nodes alone.

Each node masks the sum of its clients once, as `client.masked_client` does for a client. A node
that stops to answer after it has shared its secrets is a dropout: the others take its masks off.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pfm_llm.base.errors import ConfigError, ContractError, NodeError, NodeRefused
from pfm_llm.config.schema import FederationConfig
from pfm_llm.config.stages import FEWEST_MASKED, masks_problem
from pfm_llm.protocol import mask_messages as steps
from pfm_llm.protocol.messages import AboutReply, MaskKeys, Message, TrainRequest
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.types import Refusal
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.masked_round import MaskedRound
from pfm_llm.server.server import Server

_log = logging.getLogger(__name__)
_Reply = TypeVar("_Reply", bound=Message)

Ask = Callable[[str, Mapping[str, Message]], Mapping[str, Message | NodeRefused]]
"""See `Link.ask`."""
Slots = Mapping[int, str]
"""The slots of a node that are asked, to their client ids."""


def check_masked(federation: FederationConfig, nodes: Sequence[str], single: bool) -> None:
    """Raise `ConfigError` if rounds with these nodes cannot be masked, and say what would help."""
    problem = masks_problem(federation)
    if single:
        problem = "masks hide single updates; ask for sums, or leave federation.masks out"
    elif len(nodes) < FEWEST_MASKED:
        problem = (
            f"federation.masks needs at least {FEWEST_MASKED} nodes, these are {len(nodes)}: in a "
            "sum of two each node reads the other's; ask more nodes, or leave federation.masks out"
        )
    if problem:
        raise ConfigError(problem)


def check_keys(replies: Mapping[str, AboutReply]) -> None:
    """Raise `NodeError` unless each node knows the keys of all others.

    Nodes that lie here gain nothing: each goes by its own ``masks.peers``.

    Args:
        replies: What the nodes tell of themselves, by their names at the server.
    """
    keys: dict[str, MaskKeys] = {}
    for node, reply in replies.items():
        if reply.masks is None:
            raise NodeError(f"node {node} masks no sums; its owner sets `masks` in site.yaml")
        if reply.masks.name != node:
            raise NodeError(
                f"node {node} signs as {reply.masks.name!r:.80}; give it this name here, or set "
                f"masks.name: {node} in its site.yaml and masks.peers in those of the others"
            )
        keys[node] = reply.masks
    for node, own in keys.items():
        for other, theirs in keys.items():
            if other != node and own.peers.get(other) != theirs.key:
                raise NodeError(
                    f"node {node} does not know the key of {other}; its owner asks the other's for "
                    f"it, and sets masks.peers: {{{other}: …}} in site.yaml"
                )


class MaskedNodes:
    """Carries the steps of one round between its nodes, and counts the bytes.

    Args:
        server: The server.
        agreement: `Agreement.hash`.
        ask: Reaches the nodes.

    Attributes:
        bytes_up: Bytes of all answers: headers and tensors.
        bytes_down: Bytes of all requests.
        survivors: The nodes whose sums are in the round.
    """

    def __init__(self, server: Server, agreement: str, ask: Ask) -> None:
        self._server, self._ask = server, ask
        number = server.round_under_way
        self._head: dict[str, Any] = {"agreement": agreement, "round_number": number}
        self._problems: dict[str, tuple[str, str]] = {}  # node to what was wrong, and its code
        self.bytes_up = self.bytes_down = 0
        self.survivors: tuple[str, ...] = ()

    def train(
        self,
        requests: Mapping[str, TrainRequest],
        slots: Mapping[str, Slots],
        total: Aggregator,
    ) -> None:
        """One round.

        Args:
            requests: Node to what it is to train.
            slots: Node to its slots.
            total: Gets the sum over the nodes, and a refusal for each client that is not in it.

        Raises:
            MaskError, ContractError: The masks do not come off; ``total`` is unchanged.
        """
        masked, roster = self._opened(list(requests))
        counts = self._add_all(masked, self._shared(masked, roster), requests, slots)
        self.survivors = masked.close()
        revealed = self._revealed(self.survivors)
        num_clients = sum(counts[node] for node in self.survivors)
        found = masked.unmask((r.reveal(node) for node, r in revealed.items()), num_clients)
        ids = [client_id for node in self.survivors for client_id in slots[node].values()]
        self._server.receive_masked(total, found, num_clients, ids)
        for node, own in slots.items():
            left = node in self.survivors
            others = ("a client gave no update" if left else "no answer", Refusal.NO_ANSWER)
            why, reason = others if left else self._problems.get(node, others)
            for _ in range(len(own) - (counts[node] if left else 0)):
                total.refuse(f"node {node!r:.80}: {why}", reason)

    @property
    def problems(self) -> Sequence[str]:
        """What was wrong with nodes, for messages."""
        return [f"node {node!r:.80}: {why}" for node, (why, _) in self._problems.items()]

    def _opened(self, nodes: Sequence[str]) -> tuple[MaskedRound, tuple[steps.Advertised, ...]]:
        """The round, and the keys of the nodes that are in it."""
        request = steps.AdvertiseRequest(**self._head, num_nodes=len(nodes))
        replies = self._answers("advertise", dict.fromkeys(nodes, request), steps.AdvertiseReply)
        keys = {node: reply.signed_by for node, reply in replies.items()}
        masked = self._server.new_masked_round(keys, nodes)
        own = [r.keys.value for node, r in replies.items() if r.keys.node == node]
        return masked, tuple(map(steps.Advertised.of, masked.open(own)))

    def _shared(
        self, masked: MaskedRound, roster: tuple[steps.Advertised, ...]
    ) -> dict[str, dict[str, bytes]]:
        """Receiver to sender to sealed shares."""
        request = steps.ShareRequest(**self._head, roster=roster)
        nodes = [one.node for one in roster]
        replies = self._answers("share", dict.fromkeys(nodes, request), steps.ShareReply)
        return masked.deliver({node: reply.sealed for node, reply in replies.items()})

    def _add_all(
        self,
        masked: MaskedRound,
        received: Mapping[str, dict[str, bytes]],
        requests: Mapping[str, TrainRequest],
        slots: Mapping[str, Slots],
    ) -> dict[str, int]:
        """Add the words of the nodes; how many clients are in those of each."""
        asked = {
            node: steps.MaskRequest(**dict(requests[node]), received=own)
            for node, own in received.items()
        }
        counts = {}
        for node, reply in self._answers("mask", asked, steps.MaskReply).items():
            try:
                if reply.num_clients > len(slots[node]):
                    raise NodeRefused(NodeRefusal.MALFORMED)
                masked.add(reply.update(node))
                counts[node] = reply.num_clients
            except NodeRefused as refused:
                self._note(node, str(refused), refused.code)
            except ContractError as error:
                self._note(node, str(error), error.reason)
        return counts

    def _revealed(self, survivors: Sequence[str]) -> dict[str, steps.RevealReply]:
        confirm = steps.ConfirmRequest(**self._head, survivors=tuple(survivors))
        signed = self._answers("confirm", dict.fromkeys(survivors, confirm), steps.ConfirmReply)
        signatures = {node: reply.signature for node, reply in signed.items()}
        reveal = steps.RevealRequest(**self._head, signatures=signatures)
        return self._answers("reveal", dict.fromkeys(signed, reveal), steps.RevealReply)

    def _answers(
        self, call: str, requests: Mapping[str, Message], kind: type[_Reply]
    ) -> dict[str, _Reply]:
        """The answers of a step; who gives none is noted."""
        self.bytes_down += sum(map(_num_bytes, requests.values()))
        answers, found = self._ask(call, requests), {}
        for node in requests:
            answer = answers.get(node)
            if isinstance(answer, kind):
                self.bytes_up += _num_bytes(answer)
                found[node] = answer
            elif isinstance(answer, NodeRefused):
                self._note(node, f"{call}: {answer.code}", answer.code)
            else:
                self._note(node, f"{call}: no answer", Refusal.NO_ANSWER)
        return found

    def _note(self, node: str, problem: str, reason: str) -> None:
        _log.warning("node %s drops out of the round: %s", node, problem)
        self._problems.setdefault(node, (problem, reason))


def _num_bytes(message: Message) -> int:
    """Bytes of a message: its header, and its tensors without their names."""
    return len(message.model_dump_json()) + sum(t.nbytes for t in message.tensors.values())
