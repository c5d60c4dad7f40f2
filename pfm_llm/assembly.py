"""From a config to the objects of an experiment: what training, evaluation and serving share."""

import contextlib
import functools
import hashlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pfm_llm import assets, files
from pfm_llm import head as recommender_head
from pfm_llm.backbone import Backbone, load_backbone
from pfm_llm.client import ClientHistories, LocalTrainer
from pfm_llm.cohort_model import CohortModel
from pfm_llm.config import ExperimentConfig, load_config, training_hash
from pfm_llm.contract import UpdateContract
from pfm_llm.data.interactions import Catalogue, Interactions
from pfm_llm.data.partition import partition
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.splits import Split, split_interactions
from pfm_llm.dual_adapter import DualAdapter
from pfm_llm.encoding import HistoryEncoder
from pfm_llm.errors import CheckpointError, ConfigError, CorruptFileError, DataError, StorageError
from pfm_llm.evaluation import Evaluator
from pfm_llm.head import Normaliser
from pfm_llm.private_store import PrivateStore
from pfm_llm.processes import Processes
from pfm_llm.prompts import Prompt, load_prompt
from pfm_llm.run_report import CONFIG_FILE
from pfm_llm.trunk_cache import TrunkCache
from pfm_llm.types import SharedState

_log = logging.getLogger(__name__)
_BYTES_PER_GB = 10**9
_ITEM_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class RunFolders:
    """Where a run's files are.

    Attributes:
        public: ``<output.dir>/<name>``: may be shown to anybody.
        private: ``<output.dir>/<name>.private``, a folder apart: never leaves this machine.
    """

    public: Path
    private: Path

    @classmethod
    def of(cls, public: Path) -> "RunFolders":
        """The folders of the run at ``public``."""
        return cls(public, public.with_name(f"{public.name}.private"))

    @classmethod
    def new(cls, config: ExperimentConfig) -> "RunFolders":
        """Folders that do not exist yet: of ``<name>``, or of the next free ``<name>-<n>``."""
        base = Path(config.output.dir) / config.name
        folders, number = cls.of(base), 2
        while _is_taken(folders.public) or folders.private.exists():
            folders = cls.of(base.with_name(f"{config.name}-{number}"))
            number += 1
        return folders

    @classmethod
    def to_resume(cls, config: ExperimentConfig) -> "RunFolders":
        """The folders of the run ``<name>``.

        Raises:
            ConfigError: There is no such run.
            CheckpointError: It was started with other settings that training depends on.
        """
        folders = cls.of(Path(config.output.dir) / config.name)
        path = folders.public / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(f"no run at {folders.public} to resume; start it without --resume")
        changed = _changed_settings(load_config(path), config)
        if changed:
            raise CheckpointError(
                f"{folders.public} cannot be resumed with other settings: {'; '.join(changed)}. "
                "Restore them, or start a new run without --resume"
            )
        return folders

    @contextlib.contextmanager
    def discarded_on_failure(self) -> Iterator[None]:
        """Delete both folders when the block fails, for a run that never began."""
        try:
            yield
        except BaseException:
            shutil.rmtree(self.public, ignore_errors=True)
            shutil.rmtree(self.private, ignore_errors=True)
            raise


def _is_taken(folder: Path) -> bool:
    """Whether a folder holds anything but what a start killed at its first write leaves."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def _changed_settings(saved: ExperimentConfig, current: ExperimentConfig) -> list[str]:
    """One text for each differing setting that training depends on."""
    changed = []
    for section in type(saved).model_fields:
        replaced = saved.model_copy(update={section: getattr(current, section)})
        if training_hash(replaced) != training_hash(saved):
            old, new = (
                _leaves(config.model_dump(mode="json")[section], section)
                for config in (saved, current)
            )
            changed += [
                f"{key} was {old.get(key)}, is {new.get(key)}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            ]
    return changed


def _leaves(tree: object, key: str) -> dict[str, object]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {
        leaf: value
        for name, child in tree.items()
        for leaf, value in _leaves(child, f"{key}.{name}").items()
    }


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
        backbone: The frozen model.
        prompt: The template.
        adapter: Shared and private LoRA in PEFT's terms.
        normaliser: The catalogue's whitening.
        model: The many-clients model.
        histories: The clients and their windows.
        encoder: Renders histories.
        cache: Trunk states.
        store: The clients' private folders.
        trainer: Local training.
        evaluator: Ranking.
        initial_shared: The shared state before round 1.
        contract: What updates may hold.
    """

    config: ExperimentConfig
    corpus: Corpus
    backbone: Backbone
    prompt: Prompt
    adapter: DualAdapter
    normaliser: Normaliser
    model: CohortModel
    histories: ClientHistories
    encoder: HistoryEncoder
    cache: TrunkCache
    store: PrivateStore
    trainer: LocalTrainer
    evaluator: Evaluator
    initial_shared: SharedState
    contract: UpdateContract


def load_corpus(config: ExperimentConfig) -> Corpus:
    """Load and split the data of an experiment."""
    interactions, report = load_interactions(config.data, config.seed)
    return Corpus(interactions, report, split_interactions(interactions, config.data))


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
    """
    catalogue = corpus.interactions.catalogue
    prompt = _load_prompt(config.prompt, corpus.interactions)
    backbone = load_backbone(config.backbone, processes.device)
    encoder = _encoder(config, corpus.interactions, prompt, backbone)
    adapter = DualAdapter(backbone, config.adapters)
    initial_shared = _initial_shared(config, adapter, backbone.hidden_size, len(catalogue))
    trunk, top = backbone.split(config.adapters.num_layers)
    states = item_states(backbone, encoder, prompt, catalogue.content_hash())
    normaliser = recommender_head.fit_normaliser(states)
    texts = normaliser(states)[:, : config.head.dim].contiguous()
    model = CohortModel(top, adapter.top_paths(), adapter.scales(), normaliser, texts)
    store = PrivateStore(folders.private)
    cache = _trunk_cache(config, backbone, trunk, folders.private, processes.count)
    clients = partition(corpus.interactions, config.data.users_per_client, config.seed)
    histories = ClientHistories(clients, corpus.split.train, encoder, cache)
    contract = _contract(initial_shared, backbone, prompt, catalogue)
    private_of = functools.partial(adapter.initial_private, config.seed, head_dim=config.head.dim)
    trainer = LocalTrainer(config, model, histories, store, contract, private_of)
    return Assembly(
        config=config,
        corpus=corpus,
        backbone=backbone,
        prompt=prompt,
        adapter=adapter,
        normaliser=normaliser,
        model=model,
        histories=histories,
        encoder=encoder,
        cache=cache,
        store=store,
        trainer=trainer,
        evaluator=Evaluator(model, trainer, histories, encoder, cache, store),
        initial_shared=initial_shared,
        contract=contract,
    )


def _load_prompt(name: str, interactions: Interactions) -> Prompt:
    prompt = load_prompt(name)
    if prompt.uses_rating and interactions.ratings is None:
        raise DataError(
            f"prompt {prompt.key} shows ratings and the data has none; set data.columns.rating, "
            "or choose a prompt without ratings such as next_item.v1"
        )
    return prompt


def _encoder(
    config: ExperimentConfig, interactions: Interactions, prompt: Prompt, backbone: Backbone
) -> HistoryEncoder:
    return HistoryEncoder(
        prompt,
        interactions.catalogue,
        backbone.tokenizer,
        config.window,
        backbone.max_tokens,
        _rating_values(interactions),
    )


def _rating_values(interactions: Interactions) -> tuple[float, ...]:
    ratings = interactions.ratings
    return () if ratings is None else tuple(np.unique(ratings).tolist())


def _initial_shared(
    config: ExperimentConfig, adapter: DualAdapter, hidden_size: int, num_items: int
) -> SharedState:
    head = recommender_head.initial_head(config.head, hidden_size, num_items, config.seed)
    return SharedState({**adapter.initial_shared(config.seed), **head})


def _trunk_cache(
    config: ExperimentConfig,
    backbone: Backbone,
    trunk: nn.Module,
    private_folder: Path,
    num_processes: int,
) -> TrunkCache:
    root = Path(config.cache.dir).expanduser() if config.cache.dir else private_folder
    return TrunkCache(
        trunk,
        root / "clients",
        identity=f"{backbone.weights_hash}/{backbone.dtype}/{config.adapters.num_layers}",
        max_bytes=int(config.cache.max_gb * _BYTES_PER_GB),
        num_writers=num_processes,
    )


def _contract(
    shared: SharedState, backbone: Backbone, prompt: Prompt, catalogue: Catalogue
) -> UpdateContract:
    return UpdateContract.from_shared(
        shared,
        backbone_hash=backbone.weights_hash,
        prompt_hash=prompt.content_hash(),
        catalogue_hash=catalogue.content_hash(),
    )


def item_states(
    backbone: Backbone, encoder: HistoryEncoder, prompt: Prompt, catalogue_hash: str
) -> torch.Tensor:
    """Frozen states of the catalogue's texts, [I, d] float32, kept between runs.

    They depend on the catalogue alone, not on any user, so they are kept in the public cache
    under a key of all that they depend on.
    """
    parts = (
        backbone.weights_hash,
        str(backbone.dtype),
        backbone.device.type,
        prompt.content_hash(),
        str(encoder.config.max_item_tokens),
        catalogue_hash,
    )
    key = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]
    path = assets.cache_dir() / "items" / f"{key}.safetensors"
    try:
        tensors, header = files.read_tensors(path)
        if header["sha256"] != _sha256(tensors["states"]):
            raise CorruptFileError(f"{path} does not match its checksum")
        return tensors["states"].clone()
    except FileNotFoundError:
        pass
    except (CorruptFileError, KeyError) as error:
        _log.warning("item states: %s; computing them again", error)
    states = backbone.last_token_states(encoder.catalogue_pieces(), _ITEM_BATCH_TOKENS)
    try:
        files.write_tensors(path, {"states": states}, {"sha256": _sha256(states)})
    except StorageError as error:
        # A cache is a convenience: without it they are computed each time.
        _log.warning("item states: %s; going on without keeping them", error)
    return states


def _sha256(states: torch.Tensor) -> str:
    return hashlib.sha256(states.contiguous().view(torch.uint8).numpy().data).hexdigest()
