"""From a config to the objects of an experiment: what training, evaluation and serving share."""

from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base.processes import Processes
from pfm_llm.client.histories import ClientHistories
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.client.trainer import LocalTrainer
from pfm_llm.client.trunk_cache import TrunkCache
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.config.settings import like_threshold
from pfm_llm.config.settle import settle
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.partition import partition, trainable
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.splits import Split, split_interactions
from pfm_llm.evaluation.evaluator import Evaluator
from pfm_llm.model.build import ModelParts, build_model
from pfm_llm.publish.alignment import start_from
from pfm_llm.publish.artefact import Artefact, read_artefact
from pfm_llm.runs.folders import RunFolders

_BYTES_PER_GB = 10**9


@dataclass(frozen=True)
class Corpus:
    """The data of an experiment.

    Attributes:
        interactions: All of them.
        report: What loading read and dropped.
        split: Train, validation and test.
    """

    interactions: Interactions
    report: LoadReport
    split: Split


@dataclass(frozen=True)
class Assembly:
    """The objects of an experiment, wired.

    Attributes:
        config: The experiment.
        corpus: Its data.
        parts: The model over its catalogue.
        artefact: The published adapter that it started from, if it did.
        histories: The clients and their windows.
        cache: Trunk states.
        store: The clients' private folders.
        trainer: Local training.
        evaluator: Ranking.
    """

    config: ExperimentConfig
    corpus: Corpus
    parts: ModelParts
    artefact: Artefact | None
    histories: ClientHistories
    cache: TrunkCache
    store: PrivateStore
    trainer: LocalTrainer
    evaluator: Evaluator


def load_corpus(config: ExperimentConfig) -> Corpus:
    """Load and split the data of an experiment."""
    interactions, report = load_interactions(config.data, config.seed)
    return Corpus(interactions, report, split_interactions(interactions, config.data))


def settled(config: ExperimentConfig, corpus: Corpus) -> ExperimentConfig:
    """A config with the settings that follow from its data; see `settle`."""
    clients = partition(corpus.interactions, config.data.users_per_client, config.seed)
    return settle(config, len(trainable(clients, corpus.split.train)))


def assemble(
    config: ExperimentConfig, corpus: Corpus, folders: RunFolders, processes: Processes
) -> Assembly:
    """Wire the objects of an experiment.

    Args:
        config: The experiment.
        corpus: From `load_corpus`.
        folders: Where private states and caches go.
        processes: For the device.

    Raises:
        DataError: The prompt needs what the data lacks, or a window exceeds the context.
        BackboneError: The model cannot be had or adapted.
        ArtefactError: The adapter to start from does not fit.
    """
    interactions = corpus.interactions
    artefact = read_artefact(folders.initial_adapter) if config.init_from else None
    catalogue = interactions.catalogue
    start = start_from(artefact, catalogue)[0] if artefact else None
    parts = build_model(config, catalogue, interactions.ratings, processes.device, start)
    store = PrivateStore(folders.private)
    cache = _trunk_cache(config, parts, folders.private, processes.count)
    clients = partition(interactions, config.data.users_per_client, config.seed)
    histories = ClientHistories(
        clients, corpus.split.train, parts.encoder, cache, like_threshold(config)
    )
    trainer = make_trainer(config, parts, histories, store)
    return Assembly(
        config=config,
        corpus=corpus,
        parts=parts,
        artefact=artefact,
        histories=histories,
        cache=cache,
        store=store,
        trainer=trainer,
        evaluator=Evaluator(parts.model, trainer, histories, parts.encoder, cache, store),
    )


def make_trainer(
    config: ExperimentConfig, parts: ModelParts, histories: ClientHistories, store: PrivateStore
) -> LocalTrainer:
    """Local training of a model on some clients' histories."""
    return LocalTrainer(config, parts.model, histories, store, parts.contract)


def _trunk_cache(
    config: ExperimentConfig, parts: ModelParts, private_folder: Path, num_processes: int
) -> TrunkCache:
    backbone = parts.backbone
    root = Path(config.cache.dir).expanduser() if config.cache.dir else private_folder
    return TrunkCache(
        parts.trunk,
        root / "clients",
        identity=f"{backbone.weights_hash}/{backbone.dtype}/{config.adapters.num_layers}",
        max_bytes=int(config.cache.max_gb * _BYTES_PER_GB),
        num_writers=num_processes,
    )
