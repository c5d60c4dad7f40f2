"""How a cohort is trained: from client ids and a shared state to the cohort's updates.

The rounds know an `Exchange` and nothing of what is behind it: clients of this machine
(`LocalExchange`), or devices at the other end of a network.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.federation.aggregation_error import Factors, aggregation_error, factors_of
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.aggregation import Aggregator, Payload
from pfm_llm.server.server import Server


class Exchange(Protocol):
    """Who brings the shared state to the clients and their updates to the server."""

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        """Have a cohort trained for one round; blocks until the round may end.

        Args:
            cohort: Client ids.
            shared: What the clients start from; the round is the one after it.

        Returns:
            The cohort's updates, equal on every process of the server. Each client of the cohort
            is in it (`Server.receive`) or was refused with a reason (`Aggregator.refuse`), such
            as that it did not answer in time.
        """
        ...

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """What else the record of the last round tells."""
        ...

    def prune(self, oldest_commit: int) -> None:
        """Let the clients delete private states that no kept round needs.

        Args:
            oldest_commit: The oldest round that the run may still go back to.
        """
        ...

    def discard_newer(self, round_number: int) -> int:
        """Have private states newer than a round deleted: those rounds never happened.

        Returns:
            How many states were deleted, as far as is known.
        """
        ...


class LocalExchange:
    """All clients on this machine: each process trains its chunks in the many-clients pass.

    The updates are summed in the order of the chunks, so that the number of processes does not
    change the result.
    """

    def __init__(
        self,
        server: Server,
        trainer: LocalTrainer,
        store: PrivateStore,
        processes: Processes,
        measure_error: bool = False,
    ) -> None:
        """Connect the two sides.

        Args:
            server: Judges the updates.
            trainer: The clients' side.
            store: The clients' private folders.
            processes: Who shares the cohort.
            measure_error: Whether to measure `aggregation_error`; it holds the LoRA factors of a
                whole cohort.
        """
        self._server = server
        self._trainer = trainer
        self._store = store
        self._processes = processes
        self._measure_error = measure_error
        self._error: float | None = None

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        """See `Exchange.train`.

        Raises:
            PfmError: A client could not be trained or stored, on every process.
        """
        pieces = []
        with self._processes.together():
            for index, chunk in self._processes.share(self._trainer.chunks(cohort)):
                pieces.append((index, self._train_chunk(chunk, shared)))
        total = self._server.new_aggregator()
        clients: list[tuple[float, Factors]] = []
        for payload, own in self._processes.gather(pieces):
            total.merge(type(total).from_payload(payload))
            clients += own
        self._error = aggregation_error(clients)
        return total

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """By how much the mean of the LoRA factors misses the mean of their products."""
        return {} if self._error is None else {"aggregation_error": self._error}

    def prune(self, oldest_commit: int) -> None:
        """See `Exchange.prune`."""
        self._store.prune(oldest_commit)

    def discard_newer(self, round_number: int) -> int:
        """See `Exchange.discard_newer`."""
        return self._store.discard_newer(round_number)

    def _train_chunk(
        self, chunk: Sequence[str], shared: SharedState
    ) -> tuple[Payload, list[tuple[float, Factors]]]:
        """A chunk's updates, and the factors of each client that was accepted."""
        received = self._server.new_aggregator()
        clients: list[tuple[float, Factors]] = []
        for update in self._trainer.train_chunk(chunk, shared):
            if self._server.receive(received, update) and self._measure_error:
                weight = self._server.weight_of(update)
                clients.append((weight, factors_of(shared.tensors, update.delta)))
        return received.to_payload(), clients
