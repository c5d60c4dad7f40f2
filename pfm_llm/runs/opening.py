"""Opening a run: what it was trained on is compared with what is there now.

A run keeps tensors with a row per item, in the order of its catalogue, and a split of its data.
Neither means anything beside other files. A run therefore records what it stands on when it starts,
in ``trained_on.json``, and every later opening compares:

- The prompt and the base model must be the same.
- A catalogue in another order is put back into the order of training, so that nothing changes.
- `open_run`, for measuring and for publishing, wants the same items and interactions.
- `open_to_serve` accepts other interactions, since histories grow. It also accepts other items: it
  then serves the exported adapter, whose rows follow their items by key.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CheckpointError, CorruptFileError
from pfm_llm.base.processes import start_processes
from pfm_llm.config.earlier import load_saved
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.interactions import Interactions
from pfm_llm.protocol.types import SharedState
from pfm_llm.publish.alignment import Alignment, align_items
from pfm_llm.publish.artefact import read_artefact
from pfm_llm.runs.folders import CONFIG_FILE, ENVIRONMENT_FILE, RunFolders, find_run
from pfm_llm.runs.private_weight import choose_weight
from pfm_llm.runs.run import Corpus, Run, Trained, assemble, committed, load_corpus, settled
from pfm_llm.text.item_keys import item_keys
from pfm_llm.text.prompts import Prompt, load_prompt

TRAINED_ON_FILE = "trained_on.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedOn:
    """What a run stands on.

    Attributes:
        contract_hash: Hash of the update contract, which each commit holds too.
        prompt_hash: Hash of the prompt's content.
        backbone_hash: Hash of the base model's weights.
        interactions_hash: Hash of the interactions in the catalogue's order, without item texts.
        item_keys: A key per item, in the order of training; see `item_keys`.
        num_users: Number of users.
        num_interactions: Number of interactions.
        origins: The data sets of the Hub that were read, each with its commit, in words.
        codes_hash: Identity of the codes of the items; None where they share no vectors.
    """

    contract_hash: str
    prompt_hash: str
    backbone_hash: str
    interactions_hash: str
    item_keys: tuple[str, ...]
    num_users: int
    num_interactions: int
    origins: tuple[str, ...] = ()
    codes_hash: str | None = None

    @classmethod
    def of(cls, run: Run) -> Self:
        """What a run stands on that is about to start."""
        interactions, contract = run.data.interactions, run.model.contract
        return cls(
            contract_hash=contract.hash(),
            prompt_hash=contract.prompt_hash,
            backbone_hash=contract.backbone_hash,
            interactions_hash=interactions.events_hash(),
            item_keys=item_keys(interactions.catalogue, run.model.prompt),
            num_users=interactions.num_users,
            num_interactions=len(interactions.items),
            origins=run.data.report.origins,
            codes_hash=_codes_hash(run),
        )

    def write(self, folders: RunFolders) -> None:
        """Keep it in the run's public folder: hashes, counts and commits, no texts and no ids."""
        files.write_json(folders.public / TRAINED_ON_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folders: RunFolders) -> Self:
        """What `write` kept.

        Raises:
            CheckpointError: There is nothing, since an older version trained the run.
            CorruptFileError: The file is damaged.
        """
        path = folders.public / TRAINED_ON_FILE
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing, so nobody can tell whether the data are still those of the "
                "training; restore it, or train the run again"
            )
        try:
            tree = files.read_json(path)
            texts = {"item_keys": tree["item_keys"], "origins": tree.get("origins", ())}
            found = cls(**tree | {name: tuple(map(str, texts[name])) for name in texts})
        except (KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} is damaged ({error!r}); restore it") from error
        return found


def open_run(folder: Path) -> tuple[Run, Trained]:
    """Open a finished or interrupted run, with the state of its last commit.

    Raises:
        ConfigError: There is no such run; the message lists the runs in the same folder.
        CheckpointError: The run has no committed round, or its data, items, prompt or base model
            are not those of the training.
    """
    opening = _Opening.of(folder)
    if changes := opening.changes():
        raise opening.refusal(changes)
    run = opening.assembled(opening.folders.initial_adapter)
    return run, choose_weight(run, run.committed())


@contextlib.contextmanager
def run_in_work(folder: Path) -> Iterator[tuple[Run, Trained]]:
    """`open_run` for measuring: the run is locked during the block.

    Raises:
        BusyError: Another process trains or measures the run.
        ConfigError, CheckpointError: See `open_run`.
    """
    folders = RunFolders.of(find_run(folder, folder.parent))
    processes = start_processes(load_saved(folders.public / CONFIG_FILE).runtime.threads)
    with processes.main_holds(folders.in_work()):
        yield open_run(folder)


def open_to_serve(folder: Path) -> tuple[Run, Trained, Alignment]:
    """Open a run to recommend from it, with the histories and the items of today.

    Returns:
        The run; the state of its last commit, or of its adapter that was exported then where data
        or items changed; and how the items fit those of the training.

    Raises:
        ConfigError: There is no such run; the message lists the runs in the same folder.
        CheckpointError: The run has no committed round; or prompt or base model are not those of
            the training; or data or items are not, and the run has exported no adapter.
    """
    opening = _Opening.of(folder)
    changes = opening.changes()
    if not changes:
        run = opening.assembled(opening.folders.initial_adapter)
        return run, choose_weight(run, run.committed()), opening.alignment
    try:
        artefact = read_artefact(opening.folders.shared_adapter)
    except (ArtefactError, CorruptFileError) as error:
        raise opening.refusal(f"{changes}, and it has exported no adapter ({error})") from error
    if artefact.manifest.round != committed(opening.folders).round_number:
        raise opening.refusal(f"{changes}, and its exported adapter is not of its last round")
    _log.warning("%s: since the training %s", folder, changes)
    run = opening.assembled(opening.folders.shared_adapter)
    shared = SharedState(run.model.shared.tensors, artefact.manifest.round)
    return run, Trained(shared, artefact.manifest.adapters.private.weight), opening.alignment


def corpus_to_resume(config: ExperimentConfig, folders: RunFolders) -> Corpus:
    """The data of a run that goes on.

    Raises:
        CheckpointError: Data, items or prompt are not those of the start.
    """
    started = load_saved(folders.public / CONFIG_FILE)
    # A run that was killed before its first round stands on nothing yet. Changed settings are
    # named one by one once the data are known.
    same_settings = (started.data, started.prompt) == (config.data, config.prompt)
    if not same_settings or not (folders.public / TRAINED_ON_FILE).exists():
        return load_corpus(config)
    opening = _Opening(folders, config)
    if changes := opening.changes():
        raise opening.refusal(changes)
    return opening.data


def _codes_hash(run: Run) -> str | None:
    return None if run.model.codes is None else run.model.codes.identity()


class _Opening:
    """A run that is being opened.

    Attributes:
        folders: Its folders.
        config: Its config.
        before: What it was trained on.
        data: Its data as they are now, in the order of training where the items are the same.
        alignment: How the items fit those of the training.
    """

    def __init__(self, folders: RunFolders, config: ExperimentConfig) -> None:
        self.folders = folders
        self.config = config
        self.before = TrainedOn.read(folders)
        prompt = load_prompt(self.config.prompt)
        if prompt.content_hash() != self.before.prompt_hash:
            raise self.refusal(f"the prompt {self.config.prompt} is another one")
        self.data = load_corpus(self.config, lambda found: self._in_order(found, prompt))
        keys = item_keys(self.data.interactions.catalogue, prompt)
        self.alignment = align_items(self.before.item_keys, keys)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """A run with a committed round."""
        folders = RunFolders.of(find_run(folder, folder.parent))
        checkpoint = committed(folders)
        environment = folders.public / ENVIRONMENT_FILE
        if not environment.is_file():
            raise CheckpointError(
                f"{environment} is missing, so nobody can tell where the run was trained; restore "
                "it, or train the run again"
            )
        opening = cls(folders, load_saved(folders.public / CONFIG_FILE))
        if checkpoint.environment.contract_hash != opening.before.contract_hash:
            raise CheckpointError(
                f"{folders.server} and {folders.public / TRAINED_ON_FILE} are of two runs; restore "
                "the folder of the run as it was"
            )
        return opening

    def changes(self) -> str:
        """What differs in the data, as a sentence's part; empty where nothing does."""
        now, before, items = self.data.interactions, self.before, self.alignment
        if not items.num_kept == items.num_known == len(items.rows):
            return (
                f"{items.num_known - items.num_kept} items have gone or have another text, and "
                f"{len(items.rows) - items.num_kept} are new"
            )
        if now.events_hash() != before.interactions_hash:
            return (
                f"the interactions have changed ({now.num_users:,} users and {len(now.items):,} "
                f"interactions now, {before.num_users:,} and {before.num_interactions:,} then)"
            )
        return ""

    def assembled(self, start: Path) -> Run:
        """The run over its data, from an adapter's folder if it has one.

        Raises:
            CheckpointError: The base model, or the codes of items, are not those of the training.
        """
        processes = start_processes(self.config.runtime.threads)
        config = settled(self.config, self.data)
        artefact = read_artefact(start) if start.is_dir() else None
        run = assemble(config, self.data, self.folders, processes, artefact)
        if run.model.contract.backbone_hash != self.before.backbone_hash:
            raise self.refusal(f"the weights of {config.backbone.name} have changed")
        if not self.changes() and _codes_hash(run) != self.before.codes_hash:
            raise self.refusal("the codes of its items come out otherwise with these libraries")
        return run

    def refusal(self, changes: str) -> CheckpointError:
        """The error that says what changed and what to do."""
        then = ""
        if self.before.origins:
            then = (
                f". The training read {', '.join(self.before.origins)}; name the commit as "
                "revision in its config.yaml"
            )
        return CheckpointError(
            f"{self.folders.public} was trained on something else: {changes}. Restore the files "
            f"that it was trained on (its config.yaml names them), or train a new run{then}"
        )

    def _in_order(self, interactions: Interactions, prompt: Prompt) -> Interactions:
        keys = item_keys(interactions.catalogue, prompt)
        if keys == self.before.item_keys or sorted(keys) != sorted(self.before.item_keys):
            return interactions
        _log.warning("%s: the items are put back into the order of training", self.folders.public)
        row_of = {key: row for row, key in enumerate(keys)}
        return interactions.with_item_order([row_of[key] for key in self.before.item_keys])
