"""Membership in the training of an adapter: half of the users train it, the other half does not.

Two scores of a user whose history is known, both from one gradient at the published state:

- **loss**: the lower the loss of the history, the likelier was it trained on (Yeom et al. 2018,
  arXiv 1709.01604).
- **rows**: the cosine of the user's update with all that training has changed, over tensors with a
  row for each item. Gradients tell more than losses (Nasr et al. 2019, arXiv 1812.00910).

Neither needs shadow models, as those of Shokri et al. 2017 (arXiv 1610.05820) and Carlini et al.
2022 (arXiv 2112.03570), so that more can be told than these find.
"""

import dataclasses
import math
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pfm_llm.base.progress import Progress
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settle import known, settle
from pfm_llm.config.text import set_setting, validated
from pfm_llm.federation.exchange import LocalExchange
from pfm_llm.protocol.parameters import ParameterTable
from pfm_llm.protocol.types import ClientUpdate, SharedState
from pfm_llm.runs.run import Run, make_trainer
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


def marks(
    run: Run, client_ids: Sequence[str], trained: SharedState, what: str
) -> dict[str, np.ndarray]:
    """The scores of clients under an adapter, larger for those that trained it.

    Args:
        run: The experiment; its model has the state before training.
        client_ids: The clients.
        trained: The state after training.
        what: For the progress.

    Returns:
        Name of a score to float64 [clients].
    """
    before, names = run.model.shared.tensors, _tables(run.model.table)
    learned = {name: trained.tensors[name] - before[name] for name in names}
    found: dict[str, tuple[float, float]] = {}
    for update in updates_of(_without_dropout(run), client_ids, trained, what):
        cosines = [_cosine(update.delta[name], change) for name, change in learned.items()]
        found[update.client_id] = -update.loss, float(np.mean(cosines))
    scores = np.array([found[client_id] for client_id in client_ids])
    return {"loss": scores[:, 0], "rows": scores[:, 1]}


def _tables(table: ParameterTable) -> list[str]:
    """The matrices that are sent and have a row for each item, or code; all, if there are none."""
    matrices = {name: one for name, one in table.items() if one.sent and len(one.shape) == 2}
    rows = [name for name, one in matrices.items() if one.per_item or one.per_code]
    return rows or list(matrices)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def _without_dropout(run: Run) -> Run:
    """The run with an attacker's trainer, who wants no noise in a loss."""
    tree = run.config.model_dump(mode="json")
    for key in ("head.dropout", "adapters.shared.dropout", "adapters.private.dropout"):
        set_setting(tree, key, 0.0)
    set_setting(tree, "adapters.private.taste.dropout", None)
    config = validated(tree, ExperimentConfig, run.config.name)
    # Not validated: tensors follow from whether there is item dropout, and they stay.
    head = config.head.model_copy(update={"item_dropout": 0.0})
    return with_trainer(run, config.model_copy(update={"head": head}))


def with_trainer(run: Run, config: ExperimentConfig) -> Run:
    """The run whose clients train, and whose server aggregates, by another config."""
    clients = run.clients
    trainer = make_trainer(config, run.model, clients.histories, clients.store)
    clients = dataclasses.replace(clients, trainer=trainer)
    return dataclasses.replace(run, config=config, clients=clients)


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
