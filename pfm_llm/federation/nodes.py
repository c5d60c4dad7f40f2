"""Rounds with clients at nodes: from a cohort of slots to the sums of the nodes, and back.

A *node* holds the data of one or many clients and trains them; see `pfm_llm.node`. The server knows
a client by its *slot*, ``<node>/<number>``. Which user a slot is, only the node knows.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pfm_llm.base.errors import ContractError, MaskError, NodeError, NodeRefused, TrainingError
from pfm_llm.base.metrics_log import MetricsLog
from pfm_llm.base.processes import Processes
from pfm_llm.config.schema import training_hash
from pfm_llm.config.settle import known, settle
from pfm_llm.config.stages import FEWEST_MASKED
from pfm_llm.federation.masked_nodes import MaskedNodes, check_keys, check_masked
from pfm_llm.federation.members import Answer, Link, ask_members, meet
from pfm_llm.federation.rounds import Federation
from pfm_llm.federation.server_side import ServerSide
from pfm_llm.protocol.messages import Message, TrainReply, TrainRequest
from pfm_llm.protocol.refusals import NodeRefusal
from pfm_llm.protocol.transport import as_sent
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.checkpoint import CheckpointStore, RunEnvironment
from pfm_llm.server.server import Server

_log = logging.getLogger(__name__)


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
        NodeError: Before the first commit, a node does not answer or does not agree; or, under
            masks, does not know the keys of the others.
        ConfigError: Rounds with these nodes cannot be masked, and are to be.
        CheckpointError, CorruptFileError: The commit point cannot be read.
    """
    committed = checkpoints.load()
    population = dict(committed.environment.population) if committed else _count(side, link)
    config = settle(side.config, sum(population.values()))
    if config.federation.masks is not None:
        check_masked(config.federation, list(population), options.single)
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


def _count(side: ServerSide, link: Link) -> dict[str, int]:
    """The clients of each node of a new run."""
    replies = meet(side, link, link.nodes)
    if missing := sorted(set(link.nodes) - replies.keys()):
        raise NodeError(
            f"{', '.join(missing)} cannot take part, the warnings above say why; the nodes of "
            "a run are fixed when it begins: mend these, or leave them out"
        )
    if side.config.federation.masks is not None:
        check_keys(replies)
    return {node: reply.num_clients for node, reply in replies.items()}


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
        """See `Exchange.train`.

        In the clear, nodes that do not answer are asked once more below the quorum. Under masks no
        node is asked twice: its secrets are for one sum.

        Raises:
            TrainingError: Too few clients are in the round, or its masks do not come off.
        """
        asked: dict[str, dict[int, str]] = {}
        for client_id in cohort:
            node, _, slot = client_id.rpartition("/")
            asked.setdefault(node, {})[int(slot)] = client_id
        needed = math.ceil(self._options.quorum * len(cohort))
        if self._server.is_masked:
            total = self._train_masked(asked, shared)
        else:
            total = self._train_clear(asked, shared, needed)
        if (num_updates := total.tally.num_updates) < needed:
            raise _lost(
                shared,
                f"{num_updates} of {len(cohort)} clients are in it, {needed} are needed",
                total.tally.refusals,
            )
        return total

    def _train_clear(
        self, asked: Mapping[str, dict[int, str]], shared: SharedState, needed: int
    ) -> Aggregator:
        total, waiting = self._server.new_aggregator(), dict(asked)
        for _ in range(2):
            self._ask(waiting, shared, total)
            if total.tally.num_updates >= needed or not waiting:
                break
        for node, slots in waiting.items():
            for _ in slots:
                total.refuse(f"node {node!r}: no answer")
        size, num_nodes = self._side.model.table.num_bytes, len(asked) - len(waiting)
        num_sent = total.tally.num_updates if self._options.single else num_nodes
        self._diagnostics = {
            "nodes": num_nodes,
            "bytes_up": size * num_sent,
            "bytes_down": size * len(asked),
        }
        return total

    def _train_masked(self, asked: Mapping[str, dict[int, str]], shared: SharedState) -> Aggregator:
        total = self._server.new_aggregator()
        if len(asked) < FEWEST_MASKED:
            what = f"its clients are at {len(asked)} nodes, and masks need {FEWEST_MASKED}"
            raise _lost(shared, what, ["raise federation.cohort_size"])
        masked = MaskedNodes(self._server, self._agreement, self._answers)
        requests = {node: self._request(node, slots, shared) for node, slots in asked.items()}
        try:
            masked.train(requests, asked, total)
        except (MaskError, ContractError) as error:
            raise _lost(shared, str(error), masked.problems) from error
        for node in masked.survivors:
            self._discard.pop(node, None)
        self._diagnostics = {
            "nodes": len(masked.survivors),
            "bytes_up": masked.bytes_up,
            "bytes_down": masked.bytes_down,
        }
        return total

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """How many nodes are in the last round, and the bytes: a sum is one message.

        Under masks the bytes are those of all steps, of every node that was asked.
        """
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
        answers = self._answers("train", requests)
        for node in [node for node in requests if node in answers]:
            self._take(node, waiting.pop(node), answers[node], total)

    def _answers(self, call: str, requests: Mapping[str, Message]) -> Mapping[str, Answer]:
        return ask_members(self._side, self._link, call, requests)

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


def _lost(shared: SharedState, what: str, examples: Sequence[str]) -> TrainingError:
    why = f" ({'; '.join(examples[:3])})" if examples else ""
    return TrainingError(
        f"round {shared.round_number + 1}: {what}{why}. The round does not count; see to the nodes "
        "and continue from the last commit"
    )
