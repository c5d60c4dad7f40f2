"""Rounds with clients at nodes: from a cohort of slots to the sums of the nodes, and back.

A *node* holds the data of one or many clients and trains them; see `pfm_llm.node`. The server knows
a client by its *slot*, ``<node>/<number>``. Which user a slot is, only the node knows. A `Link`
carries the calls to the nodes: in this process, over sockets, or by an engine such as Flower.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pfm_llm.base.errors import NodeError, NodeRefused, TrainingError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.config.schema import training_hash
from pfm_llm.config.settle import known, settle
from pfm_llm.federation.rounds import Federation
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.protocol.messages import AboutReply, Message, TrainReply, TrainRequest
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_sent
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment
from pfm_llm.server.server import Server

_log = logging.getLogger(__name__)
_INVITED_AGAIN = (NodeRefusal.NOT_READY, NodeRefusal.AGREEMENT)
"""What a node says that was restarted, or has taken part in another federation meanwhile."""

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
            call: A key of `messages.CALLS`.
            requests: Node to request.

        Returns:
            Node to its answer of the call's type, or to its refusal. A node that cannot be reached,
            or does not answer in time, is left out.
        """
        ...


@dataclass(frozen=True)
class NodesOptions:
    """How rounds with nodes go.

    Attributes:
        quorum: Share of a cohort, in (0, 1], that must be in a round, or the round does not count.
        single: Ask for single updates in place of sums, for research; the nodes' owners must allow
            it.
    """

    quorum: float = 0.5
    single: bool = False


def slot_id(node: str, slot: int) -> str:
    """The client id of a slot, such as ``n03/00017``."""
    return f"{node}/{slot:05d}"


def slots_of(population: Mapping[str, int]) -> list[str]:
    """The client ids of a population, name of a node to its number of clients."""
    return [slot_id(node, slot) for node, count in population.items() for slot in range(count)]


def meet(side: ServerSide, link: Link, nodes: Sequence[str]) -> dict[str, int]:
    """Invite nodes to a federation.

    Args:
        side: The server's side.
        link: Reaches the nodes.
        nodes: Some of the link's.

    Returns:
        Node to its number of clients, for each node that takes part.
    """
    population = {}
    answers = link.ask("about", dict.fromkeys(nodes, side.invitation))
    for node in nodes:
        answer = answers.get(node)
        if not isinstance(answer, AboutReply):
            _log.warning("node %s: %s", node, "no answer" if answer is None else answer)
        elif answer.agreed is None or (apart := answer.agreed.value.difference(side.agreement)):
            what = apart if answer.agreed else "everything"
            _log.warning("node %s (pfm_llm %s) differs in: %s", node, answer.version, what)
        else:
            if answer.dtype != side.dtype:
                _log.warning(
                    "node %s computes in %s, the server in %s: its updates are a little noisier",
                    *(node, answer.dtype, side.dtype),
                )
            population[node] = answer.num_clients
    return population


def federation_of_nodes(
    side: ServerSide,
    link: Link,
    checkpoints: CheckpointStore,
    metrics_log: MetricsLog,
    processes: Processes,
    options: NodesOptions = NodesOptions(),
) -> Federation:
    """The objects of the loop, with clients at nodes.

    The population is that of the commit point. A run without a commit invites all nodes and counts
    their clients.

    Args:
        side: The server's side.
        link: Reaches the nodes.
        checkpoints: The commit point of the run.
        metrics_log: One line per round.
        processes: This process, alone.
        options: How rounds go.

    Raises:
        NodeError: Before the first commit, a node does not answer or does not agree.
        CheckpointError, CorruptFileError: The commit point cannot be read.
    """
    committed = checkpoints.load()
    if committed is None:
        population = meet(side, link, link.nodes)
        if missing := sorted(set(link.nodes) - population.keys()):
            raise NodeError(
                f"{', '.join(missing)} cannot take part, the warnings above say why; the nodes of "
                "a run are fixed when it begins: mend these, or leave them out"
            )
    else:
        population = dict(committed.environment.population)
    config = settle(side.config, sum(population.values()))
    server = side.new_server(slots_of(population), config)
    environment = RunEnvironment.here(
        config_hash=training_hash(config),
        contract_hash=side.agreement.contract,
        data_hash=side.agreement.hash(),
        num_processes=processes.count,
        tokens_per_chunk=config.runtime.tokens_per_chunk,
        device=processes.device,
    )
    environment = dataclasses.replace(environment, population=population)
    cohort_size = known(config.federation.cohort_size)
    exchange = NodesExchange(side, server, link, cohort_size, options)
    exchange.discard_newer(committed.round_number if committed else 0)
    return Federation(config, server, exchange, checkpoints, environment, metrics_log, processes)


class NodesExchange:
    """An `Exchange` whose clients are at nodes.

    Args:
        side: The server's side.
        server: Checks what arrives.
        link: Reaches the nodes.
        cohort_size: Clients of a round.
        options: How rounds go.
    """

    def __init__(
        self,
        side: ServerSide,
        server: Server,
        link: Link,
        cohort_size: int,
        options: NodesOptions = NodesOptions(),
    ) -> None:
        self._side, self._server, self._link = side, server, link
        self._agreement = side.agreement.hash()
        self._cohort_size, self._options = cohort_size, options
        self._oldest_commit = 0
        # Node to the round after which it must delete private states, before it trains.
        self._discard: dict[str, int] = {}
        self._diagnostics: dict[str, float] = {}

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        """See `Exchange.train`. Nodes that do not answer are asked once more below the quorum.

        Raises:
            TrainingError: Too few clients are in the round.
        """
        total = self._server.new_aggregator()
        waiting: dict[str, dict[int, str]] = {}
        for client_id in cohort:
            node, _, slot = client_id.rpartition("/")
            waiting.setdefault(node, {})[int(slot)] = client_id
        num_asked, needed = len(waiting), math.ceil(self._options.quorum * len(cohort))
        for _ in range(2):
            self._ask(waiting, shared, total)
            if total.tally.num_updates >= needed or not waiting:
                break
        for node, slots in waiting.items():
            for _ in slots:
                total.refuse(f"node {node!r}: no answer")
        if total.tally.num_updates < needed:
            raise TrainingError(
                f"round {shared.round_number + 1}: {total.tally.num_updates} of {len(cohort)} "
                f"clients are in it, {needed} are needed ({'; '.join(total.tally.refusals[:3])}). "
                "The round does not count; see to the nodes and continue from the last commit"
            )
        size = self._side.model.table.num_bytes
        num_sent = total.tally.num_updates if self._options.single else num_asked - len(waiting)
        self._diagnostics = {
            "nodes": num_asked - len(waiting),
            "bytes_up": size * num_sent,
            "bytes_down": size * num_asked,
        }
        return total

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """How many nodes answered in the last round, and the bytes: a sum is one message."""
        return self._diagnostics

    def prune(self, oldest_commit: int) -> None:
        """See `Exchange.prune`; the nodes are told with their next training."""
        self._oldest_commit = oldest_commit

    def discard_newer(self, round_number: int) -> int:
        """See `Exchange.discard_newer`; each node is told with its next training."""
        self._discard = dict.fromkeys(self._link.nodes, round_number)
        return 0

    def _ask(
        self, waiting: dict[str, dict[int, str]], shared: SharedState, total: Aggregator
    ) -> None:
        """Ask the waiting nodes, and take in what they send; who has answered waits no more."""
        requests = {node: self._request(node, slots, shared) for node, slots in waiting.items()}
        answers = dict(self._link.ask("train", requests))
        again = [
            node
            for node, answer in answers.items()
            if isinstance(answer, NodeRefused) and answer.code in _INVITED_AGAIN
        ]
        if again:
            _log.info("inviting again: %s", ", ".join(again))
            back = meet(self._side, self._link, again)
            answers |= self._link.ask("train", {node: requests[node] for node in back})
        for node in [node for node in requests if node in answers]:
            self._take(node, waiting.pop(node), answers[node], total)

    def _request(self, node: str, slots: Mapping[int, str], shared: SharedState) -> TrainRequest:
        return TrainRequest(
            agreement=self._agreement,
            round_number=shared.round_number + 1,
            slots=tuple(sorted(slots)),
            cohort_size=self._cohort_size,
            single=self._options.single,
            oldest_commit=self._oldest_commit,
            discard_newer=self._discard.get(node),
            tensors=dict(as_sent(shared.tensors, self._server.contract.tensors)),
        )

    def _take(self, node: str, slots: Mapping[int, str], answer: Answer, total: Aggregator) -> None:
        """Give an answer to the server, or count each slot as refused."""
        ids = [slots[slot] for slot in sorted(slots)]
        try:
            if isinstance(answer, NodeRefused):
                raise answer
            if not isinstance(answer, TrainReply):
                raise NodeRefused(NodeRefusal.MALFORMED)
            if not self._options.single:
                self._server.receive_sum(total, answer.node_update(node), ids)
            else:
                updates = answer.client_updates(slots)
                for update in updates:
                    self._server.receive(total, update)
                for client_id in sorted({*ids} - {update.client_id for update in updates}):
                    total.refuse(f"client {client_id!r}: no update")
        except NodeRefused as refused:
            _log.warning("node %s refused round: %s", node, refused.code)
            for _ in ids:
                total.refuse(f"node {node!r}: {refused.code}", refused.code)
            return
        self._discard.pop(node, None)
