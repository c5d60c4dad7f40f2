"""A run as one value: the connected objects that training, evaluation and serving share."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.errors import CheckpointError
from pfm_llm.base.processes import Processes
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.client.trunk_cache import TrunkCache
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import like_threshold
from pfm_llm.config.settle import settle
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.partition import Client, partition, trainable
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.splits import Split, TrainData, split_interactions
from pfm_llm.evaluation.evaluator import Evaluator
from pfm_llm.evaluation.scorer import Scorer
from pfm_llm.model.build import ModelParts, build_model
from pfm_llm.model.items.fitted import FittedTexts
from pfm_llm.protocol.types import SharedState
from pfm_llm.publish.alignment import start_from
from pfm_llm.publish.artefact import Artefact
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.checkpoint import Checkpoint, CheckpointStore
from pfm_llm.server.server import Server

BYTES_PER_GB = 10**9


@dataclass(frozen=True)
class Corpus:
    """The data of an experiment.

    Attributes:
        interactions: All interactions.
        report: The rows that were read and dropped.
        split: Train, validation and test.
    """

    interactions: Interactions
    report: LoadReport
    split: Split


@dataclass(frozen=True)
class Clients:
    """The simulated clients.

    Attributes:
        histories: Their histories and training windows.
        cache: The trunk states of their windows.
        store: Their private folders.
        trainer: Their local training.
    """

    histories: ClientHistories
    cache: TrunkCache
    store: PrivateStore
    trainer: LocalTrainer


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        shared: The shared state.
        private_weight: The weight of the private part, from the config or chosen on validation.
    """

    shared: SharedState
    private_weight: float


@dataclass(frozen=True)
class Run:
    """The connected objects of an experiment. They do not change from round to round.

    Attributes:
        config: The experiment.
        folders: The folders of its files.
        processes: The processes of the run.
        data: Its interactions and their split.
        model: The model over its catalogue.
        clients: The simulated clients.
        artefact: The published adapter that it started from; None: a new model.
    """

    config: ExperimentConfig
    folders: RunFolders
    processes: Processes
    data: Corpus
    model: ModelParts
    clients: Clients
    artefact: Artefact | None = None

    @property
    def scorer(self) -> Scorer:
        """Scores the catalogue after histories of the clients."""
        return Scorer(self.model.model, self.model.encoder, self.clients.cache.states)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Ranks the held-out items of the clients."""
        clients = self.clients
        return Evaluator(self.scorer, clients.trainer, clients.histories, clients.store)

    @property
    def checkpoints(self) -> CheckpointStore:
        """The committed rounds."""
        return CheckpointStore(self.folders.server)

    def new_server(self) -> Server:
        """The server before round 1."""
        return Server(
            self.model.table,
            self.model.contract,
            self.clients.histories.trainable,
            self.config.federation,
            self.config.seed,
            self.model.shared,
        )

    def committed(self, round_number: int | None = None) -> SharedState:
        """The shared state of a committed round.

        Args:
            round_number: A kept round; None: the newest.

        Raises:
            CheckpointError: The run has no committed round, or the round is not kept.
        """
        checkpoint = committed(self.folders, round_number)
        server = self.new_server()
        server.load_state_tensors(checkpoint.tensors, checkpoint.round_number)
        return server.shared

    def as_set(self, shared: SharedState) -> Trained:
        """A shared state with the private weight of the config."""
        return Trained(shared, self.config.adapters.private.weight)


def committed(folders: RunFolders, round_number: int | None = None) -> Checkpoint:
    """A committed round of a run; see `Run.committed`."""
    folders.check_layout()
    checkpoint = CheckpointStore(folders.server).load(round_number)
    if checkpoint is None:
        raise CheckpointError(
            f"{folders.public} has no committed round; run `pfm train --resume` first"
        )
    return checkpoint


def load_corpus(
    config: ExperimentConfig, arranged: Callable[[Interactions], Interactions] | None = None
) -> Corpus:
    """Load and split the data of an experiment.

    Args:
        config: The experiment.
        arranged: Is given the interactions, and returns those to split.
    """
    interactions, report = load_interactions(config.data, config.seed)
    if arranged is not None:
        interactions = arranged(interactions)
    return Corpus(interactions, report, split_interactions(interactions, config.data))


def settled(config: ExperimentConfig, data: Corpus) -> ExperimentConfig:
    """A config with the settings that follow from its data; see `settle`."""
    clients = partition(data.interactions, config.data.users_per_client, config.seed)
    return settle(config, len(trainable(clients, data.split.train)))


def assemble(
    config: ExperimentConfig,
    data: Corpus,
    folders: RunFolders,
    processes: Processes,
    artefact: Artefact | None = None,
    fitted: FittedTexts | None = None,
) -> Run:
    """Make and connect the objects of an experiment.

    Args:
        config: The experiment.
        data: From `load_corpus`.
        folders: The folders for private states and caches.
        processes: The processes of the run, which know the device.
        artefact: A published adapter to start from; None: a new model.
        fitted: Whitening and codes that a server gives; None: see `build_model`.

    Raises:
        DataError: The prompt needs a field that the data lacks, or a window exceeds the context.
        BackboneError: The model cannot be loaded or adapted.
        ArtefactError: The adapter to start from does not fit.
    """
    interactions = data.interactions
    catalogue = interactions.catalogue
    start = start_from(artefact, catalogue)[0] if artefact else None
    model = build_model(config, catalogue, interactions.ratings, processes.device, start, fitted)
    clients = make_clients(
        config,
        model,
        partition(interactions, config.data.users_per_client, config.seed),
        data.split.train,
        _trunk_cache(config, model, folders.private, processes.count),
        PrivateStore(folders.private),
    )
    return Run(config, folders, processes, data, model, clients, artefact)


def make_clients(
    config: ExperimentConfig,
    model: ModelParts,
    members: Sequence[Client],
    train: TrainData,
    cache: TrunkCache,
    store: PrivateStore,
) -> Clients:
    """Make clients with their training data.

    Args:
        config: The experiment.
        model: The model that they train.
        members: The clients and their users.
        train: All training data.
        cache: The cache of their trunk states.
        store: The store of their private states.
    """
    histories = ClientHistories(members, train, model.encoder, cache.states, like_threshold(config))
    return Clients(histories, cache, store, make_trainer(config, model, histories, store))


def make_trainer(
    config: ExperimentConfig, model: ModelParts, histories: ClientHistories, store: PrivateStore
) -> LocalTrainer:
    """Local training of a model on some clients' histories."""
    return LocalTrainer(config, model.model, histories, store, model.contract)


def _trunk_cache(
    config: ExperimentConfig, model: ModelParts, private_folder: Path, num_processes: int
) -> TrunkCache:
    backbone = model.backbone
    root = Path(config.cache.dir).expanduser() if config.cache.dir else private_folder
    return TrunkCache(
        model.trunk,
        root / "clients",
        identity=f"{backbone.weights_hash}/{backbone.dtype}/{config.adapters.num_layers}",
        max_bytes=int(config.cache.max_gb * BYTES_PER_GB),
        num_writers=num_processes,
    )
