"""From a config to the objects of an experiment: what training, evaluation and serving share."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from pfm_llm import assets, files
from pfm_llm import head as recommender_head
from pfm_llm.backbone import Backbone, load_backbone
from pfm_llm.client import ClientHistories, LocalTrainer
from pfm_llm.cohort_model import CohortModel
from pfm_llm.config import ExperimentConfig
from pfm_llm.contract import UpdateContract
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.partition import partition
from pfm_llm.data.report import LoadReport
from pfm_llm.data.sources import load_interactions
from pfm_llm.data.splits import Split, split_interactions
from pfm_llm.dual_adapter import DualAdapter
from pfm_llm.encoding import HistoryEncoder
from pfm_llm.errors import CorruptFileError
from pfm_llm.evaluation import Evaluator
from pfm_llm.head import Normaliser
from pfm_llm.private_store import PrivateStore
from pfm_llm.processes import Processes
from pfm_llm.prompts import Prompt, load_prompt
from pfm_llm.trunk_cache import TrunkCache
from pfm_llm.types import SharedState

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
    """
    catalogue = corpus.interactions.catalogue
    backbone = load_backbone(config.backbone, processes.device)
    prompt = load_prompt(config.prompt)
    encoder = HistoryEncoder(
        prompt, catalogue, backbone.tokenizer, config.window, backbone.max_tokens
    )
    adapter = DualAdapter(backbone, config.adapters)
    initial_shared = SharedState(
        {
            **adapter.initial_shared(config.seed),
            **recommender_head.initial_head(
                config.head, backbone.hidden_size, len(catalogue), config.seed
            ),
        }
    )
    trunk, top = backbone.split(config.adapters.num_layers)
    states = item_states(backbone, encoder, prompt, catalogue.content_hash())
    normaliser = recommender_head.fit_normaliser(states)
    texts = normaliser(states)[:, : config.head.dim].contiguous()
    model = CohortModel(top, adapter.top_paths(), adapter.scales(), normaliser, texts)
    store = PrivateStore(folders.private)
    cache_root = Path(config.cache.dir).expanduser() if config.cache.dir else folders.private
    cache = TrunkCache(
        trunk,
        cache_root / "clients",
        identity=f"{backbone.weights_hash}/{backbone.dtype}/{config.adapters.num_layers}",
        max_bytes=int(config.cache.max_gb * _BYTES_PER_GB),
    )
    clients = partition(corpus.interactions, config.data.users_per_client, config.seed)
    histories = ClientHistories(clients, corpus.split.train, encoder, cache)
    contract = UpdateContract.from_shared(
        initial_shared,
        backbone_hash=backbone.weights_hash,
        prompt_hash=prompt.content_hash(),
        catalogue_hash=catalogue.content_hash(),
    )
    trainer = LocalTrainer(
        config,
        model,
        histories,
        store,
        contract,
        lambda client_id: adapter.initial_private(config.seed, client_id, config.head.dim),
    )
    evaluator = Evaluator(model, trainer, histories, encoder, cache, store)
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
        evaluator=evaluator,
        initial_shared=initial_shared,
        contract=contract,
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
    if path.exists():
        try:
            return files.read_tensors(path)[0]["states"].clone()
        except (CorruptFileError, KeyError):
            path.unlink(missing_ok=True)
    states = backbone.last_token_states(encoder.catalogue_pieces(), _ITEM_BATCH_TOKENS)
    files.write_tensors(path, {"states": states})
    return states
