"""Membership in the training of an adapter: half of the users train it, the other half does not.

A user's history has a lower loss under an adapter that was trained on it. The score is by how much
training has lowered it: the loss of the initial state calibrates for histories that are easy for
everybody (Watson et al. 2022, arXiv 2111.08440; the attack by loss is that of Yeom et al. 2018,
arXiv 1709.01604). It needs no shadow models, as those of Shokri et al. 2017 (arXiv 1610.05820) and
Carlini et al. 2022 (arXiv 2112.03570), and is therefore a lower bound of what can be told.
"""

import math
import secrets
from collections.abc import Iterator, Sequence

import numpy as np

from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known, settle
from pfm_llm.config.text import set_setting, validated
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.runs.run import Run
from pfm_llm.server.privacy.noise import KEY_BYTES
from pfm_llm.server.server import Server


def halves(run: Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The clients that train an adapter, and as many others, or one fewer; by the run's seed."""
    clients = run.clients.histories.trainable
    order = numpy_generator(run.config.seed, "audit/halves").permutation(len(clients))
    middle = -(-len(clients) // 2)
    return (
        tuple(sorted(clients[place] for place in order[:middle])),
        tuple(sorted(clients[place] for place in order[middle:])),
    )


def train_on(run: Run, client_ids: Sequence[str], passes: float) -> SharedState:
    """Train from the beginning on some clients, with all that the run's config asks for.

    Args:
        run: The experiment with its protections; its clients train.
        client_ids: Those that take part.
        passes: Mean participations of a client.

    Raises:
        PfmError: A client could not be trained, or a step was not finite.
    """
    federation = _shortened(run.config, len(client_ids), passes).federation
    model, clients = run.model, run.clients
    seed, start = run.config.seed, model.shared
    server = Server(model.table, model.contract, client_ids, federation, seed, start)
    start_noise(server)
    exchange = LocalExchange(server, clients.trainer, clients.store, run.processes)
    rounds = known(federation.num_rounds)
    with Progress(rounds, "training on half of the users", unit="rounds") as progress:
        for round_number in range(1, rounds + 1):
            updates = exchange.train(server.select_cohort(round_number), server.broadcast)
            if server.privacy is not None:
                server.privacy.charge(round_number)
            summary = server.aggregate(updates)
            progress.update(1, loss=math.nan if summary.loss is None else summary.loss)
    return server.shared


def start_noise(server: Server) -> None:
    """Begin a ledger that nobody keeps, where the server puts noise on sums."""
    if server.privacy is not None:
        ledger = server.privacy.new_ledger(secrets.token_bytes(KEY_BYTES))
        server.privacy.start(ledger, secrets.token_bytes(KEY_BYTES))


def updates_of(
    run: Run, client_ids: Sequence[str], shared: SharedState, what: str
) -> Iterator[ClientUpdate]:
    """The update of each client at a shared state, as its trainer makes it, in any order.

    Args:
        run: The experiment with its protections.
        client_ids: The clients.
        shared: The state.
        what: For the progress.
    """
    trainer = run.clients.trainer
    with Progress(len(client_ids), what) as progress:
        for chunk in trainer.chunks(client_ids):
            yield from trainer.train_chunk(chunk, shared)
            progress.update(len(chunk))


def losses(run: Run, client_ids: Sequence[str], shared: SharedState, what: str) -> np.ndarray:
    """The training loss (nats) of each client at a shared state, float64 [clients]."""
    found = {one.client_id: one.loss for one in updates_of(run, client_ids, shared, what)}
    return np.array([found[client_id] for client_id in client_ids])


def _shortened(config: ExperimentConfig, num_clients: int, passes: float) -> ExperimentConfig:
    """Settings that follow from the number of clients follow anew; nothing is validated."""
    tree = config.model_dump(mode="json")
    cohort = config.federation.cohort_size
    changes = {
        "federation.cohort_size": None if cohort is None else min(cohort, num_clients),
        "federation.num_rounds": None,
        "federation.passes": passes,
        "federation.server.warmup_rounds": None,
    }
    for key, value in changes.items():
        set_setting(tree, key, value)
    return settle(validated(tree, ExperimentConfig, config.name), num_clients)
