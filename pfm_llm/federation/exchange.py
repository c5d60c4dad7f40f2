"""The training of a cohort: from client ids and a shared state to the cohort's updates.

The rounds only know the `Exchange` protocol. The clients may be on this machine (`LocalExchange`)
or at the other end of a network.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import StepTrainer
from pfm_llm.client.trunk_cache import TrunkCache
from pfm_llm.federation.aggregation_error import Factors, aggregation_error, factors_of
from pfm_llm.federation.masked_cohort import MaskedCohort
from pfm_llm.protocol.types import SharedState
from pfm_llm.server.aggregation import Aggregator
from pfm_llm.server.server import Server


class Exchange(Protocol):
    """Brings the shared state to the clients and their updates to the server."""

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        """Train a cohort for one round; blocks until the round may end.

        Args:
            cohort: Client ids.
            shared: The state that the clients start from; the round is the next one.

        Returns:
            The updates of the cohort, equal on every process of the server. Each client was either
            accepted (`Server.receive`) or refused with a reason (`Aggregator.refuse`), for example
            because it did not answer in time.
        """
        ...

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """Further figures for the record of the last round."""
        ...

    def prune(self, oldest_commit: int) -> None:
        """Tell the clients to delete private states that no kept round needs.

        Args:
            oldest_commit: The oldest round that the run may still go back to.
        """
        ...

    def discard_newer(self, round_number: int) -> int:
        """Tell the clients to delete private states that are newer than a round.

        Returns:
            Number of deleted states, as far as it is known.
        """
        ...


class LocalExchange:
    """All clients on this machine: each process trains its chunks in the many-clients pass.

    The updates are merged in the order of the chunks, so the number of processes does not change
    the result. With ``federation.masks`` each client masks its update, and the server's side only
    learns the sum; see `masked_cohort`.
    """

    def __init__(
        self,
        server: Server,
        trainer: StepTrainer,
        store: PrivateStore,
        processes: Processes,
        measure_error: bool = False,
        cache: TrunkCache | None = None,
    ) -> None:
        """Connect the two sides.

        Args:
            server: Checks the updates.
            trainer: Trains the clients.
            store: The clients' private folders.
            processes: The processes that share the cohort.
            measure_error: Whether to measure `aggregation_error`, which keeps the LoRA factors of
                a whole cohort in memory.
            cache: The cache of the clients' trunk states, whose work is put on record.

        Raises:
            ConfigError: The aggregation error is to be measured under masks.
        """
        if measure_error and server.is_masked:
            raise ConfigError(
                "the aggregation error needs single updates, which federation.masks hides; "
                "measure it in a run without masks"
            )
        self._server = server
        self._masked = MaskedCohort(server, processes) if server.is_masked else None
        self._trainer = trainer
        self._store = store
        self._processes = processes
        self._measure_error = measure_error
        clocks = {"trunk_seconds": cache, "mask_seconds": self._masked}
        self._clocks = {name: clock for name, clock in clocks.items() if clock is not None}
        self._diagnostics: dict[str, float] = {}

    def train(self, cohort: Sequence[str], shared: SharedState) -> Aggregator:
        """See `Exchange.train`.

        Raises:
            PfmError: A client could not be trained or stored, on every process.
        """
        before = {name: clock.seconds for name, clock in self._clocks.items()}
        self._diagnostics = {}
        absent = sorted(self._server.simulated_dropouts(shared.round_number + 1))
        chunks = self._trainer.chunks([c for c in cohort if c not in absent])
        if self._masked is None:
            total = self._train_in_the_clear(chunks, shared)
            for client_id in absent:
                total.refuse(f"client {client_id!r:.80}: no answer")
        else:
            total = self._masked.train(
                absent, chunks, lambda chunk: self._trainer.train_chunk(chunk, shared)
            )
        for name, clock in self._clocks.items():
            self._diagnostics[name] = clock.seconds - before[name]
        return total

    @property
    def diagnostics(self) -> Mapping[str, float]:
        """The aggregation error of the last round, if measured; seconds of trunk and masks."""
        return self._diagnostics

    def prune(self, oldest_commit: int) -> None:
        """See `Exchange.prune`."""
        self._store.prune(oldest_commit)

    def discard_newer(self, round_number: int) -> int:
        """See `Exchange.discard_newer`."""
        return self._store.discard_newer(round_number)

    def _train_in_the_clear(
        self, chunks: Sequence[Sequence[str]], shared: SharedState
    ) -> Aggregator:
        with self._processes.together():
            pieces = [
                (index, self._train_chunk(chunk, shared))
                for index, chunk in self._processes.share(chunks)
            ]
        total = self._server.new_aggregator()
        clients: list[tuple[float, Factors]] = []
        for received, factors in self._processes.gather(pieces):
            total.merge(received)
            clients += factors
        error = aggregation_error(clients)
        if error is not None:
            self._diagnostics["aggregation_error"] = error
        return total

    def _train_chunk(
        self, chunk: Sequence[str], shared: SharedState
    ) -> tuple[Aggregator, list[tuple[float, Factors]]]:
        """The updates of a chunk, and the factors of each accepted client."""
        received = self._server.new_aggregator()
        clients: list[tuple[float, Factors]] = []
        for update in self._trainer.train_chunk(chunk, shared):
            if self._server.receive(received, update) and self._measure_error:
                weight = self._server.weight_of(update)
                clients.append((weight, factors_of(shared.tensors, update.delta)))
        return received, clients
