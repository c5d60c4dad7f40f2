"""A published shared adapter: the files of its folder, its manifest, and reading it back.

``pfm_manifest.json`` lists every other file with its SHA-256, except the card ``README.md``, which
its owner may edit on the Hub. It also identifies everything that the adapter depends on: the base
model's weights and tokenizer, the prompt, the catalogue and the previous adapter or version. An
optional signature is over the manifest's bytes and therefore covers all listed files.

====================================  ==================================================
file                                  holds
====================================  ==================================================
``adapter_config.json``               PEFT's
``adapter_model.safetensors``         PEFT's: the shared LoRA
``recommender_head.safetensors``      the head, and the catalogue's whitening
``private_basis.safetensors``         with ``shared_basis`` or ``taste``: the basis of all
``item_keys.json``                    a key per item, to align what belongs to items
``prompts/<key>.toml``                the prompt
``training_config.yaml``              the resolved config, paths reduced to names
``plots/*.png``                       of the run
``pfm_manifest.json``                 the manifest
``pfm_manifest.sig``                  its signature, when it was signed
``README.md``                         the model card
====================================  ==================================================
"""

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CorruptFileError
from pfm_llm.config.choices import Dtype, Task
from pfm_llm.config.model import AdaptersConfig, HeadConfig, WindowConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.head import Normaliser
from pfm_llm.model.lora import tensors_from_peft
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import ParameterTable, Sizes
from pfm_llm.protocol.types import Tensors, lora_name
from pfm_llm.text.prompts import Prompt, load_prompt

FORMAT = 4
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD_FILE = "recommender_head.safetensors"
BASIS_FILE = "private_basis.safetensors"
ITEM_KEYS_FILE = "item_keys.json"
PROMPT_FILES = "prompts/*.toml"
TRAINING_CONFIG_FILE = "training_config.yaml"
PLOT_FILES = "plots/*.png"
MANIFEST_FILE = "pfm_manifest.json"
SIGNATURE_FILE = "pfm_manifest.sig"
CARD_FILE = "README.md"

REQUIRED_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, ITEM_KEYS_FILE)
LISTED_FILES = (*REQUIRED_FILES, BASIS_FILE, PROMPT_FILES, TRAINING_CONFIG_FILE, PLOT_FILES)
"""Patterns of the files that a manifest may list. A published folder holds only these, the
manifest, its signature and the card."""

_MEAN, _BASIS = "normaliser.mean", "normaliser.basis"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """The frozen model that an adapter was trained on.

    Attributes:
        name: Hub id, or the last part of a local folder's name.
        embedded: Its embedded name, when the weights came with a package registry.
        revision: The Hub revision that was asked for.
        dtype: The compute type that was asked for; ``auto`` depends on the machine.
        weights_sha256: See `backbone.hash_weights`.
        tokenizer_sha256: Over the vocabulary.
    """

    name: str
    embedded: str | None
    revision: str | None
    dtype: Dtype
    weights_sha256: str
    tokenizer_sha256: str


class Parent(_Part):
    """A predecessor of an adapter.

    Attributes:
        relation: ``previous``: the version before it in the same repository; ``trained_from``:
            the adapter that its training started from; ``restored``: the version that a rollback
            brought back.
        manifest_sha256: Of the parent's manifest.
        repo: Hub id or folder name.
        revision: The commit, where it is known.
    """

    relation: Literal["previous", "trained_from", "restored"]
    manifest_sha256: str
    repo: str
    revision: str | None = None


class Metric(_Part):
    """One figure of the evaluation, on test, over the full catalogue.

    Attributes:
        mode: Value of `types.Mode`.
        metric: Such as ``ndcg@10``.
        value: Mean over users.
        ci_low, ci_high: Bootstrap interval over users.
    """

    mode: str
    metric: str
    value: float
    ci_low: float
    ci_high: float


class Manifest(_Part):
    """``pfm_manifest.json``.

    Attributes:
        format: `FORMAT`.
        pfm_llm: Version of this library.
        name: Of the run.
        round: The last round of the adapter's training.
        base: The frozen model.
        adapters: Rank, alpha, targets and layers of both adapters, so that a user can
            personalise it.
        modules: Paths of the adapted modules.
        head, tasks: Settings of the recommender head, and its tasks.
        window: Settings of the windows.
        prompt: Key of the prompt.
        prompt_sha256: Hash of the prompt's content.
        data_source: Name of the data, or the last part of its path.
        catalogue_sha256: Hash of ids and texts.
        num_items: Size of the catalogue.
        contract_sha256: Hash of the federation's update contract.
        parents: The predecessors; empty for a first version.
        metrics: Figures of the evaluation; empty before the first evaluation.
        files: Name to SHA-256 of every listed file.
    """

    format: Literal[4]
    pfm_llm: str
    name: str
    round: int
    base: Base
    adapters: AdaptersConfig
    modules: tuple[str, ...]
    head: HeadConfig
    tasks: tuple[Task, ...] = (Task.NEXT_ITEM,)
    window: WindowConfig
    prompt: str
    prompt_sha256: str
    data_source: str
    catalogue_sha256: str
    num_items: int
    contract_sha256: str
    parents: tuple[Parent, ...] = ()
    metrics: tuple[Metric, ...] = ()
    files: dict[str, str]

    def to_bytes(self) -> bytes:
        """The bytes of the file, which are hashed, signed and published."""
        tree = self.model_dump(mode="json")
        return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> "Manifest":
        """Parse a manifest.

        Args:
            content: The file's bytes.
            origin: The source of the file, for messages.

        Raises:
            CorruptFileError: The content is no manifest of this format.
        """
        try:
            tree = json.loads(content)
        except ValueError as error:
            raise CorruptFileError(f"{origin} is not valid JSON ({error})") from error
        found = tree.get("format") if isinstance(tree, dict) else None
        if found != FORMAT:
            raise CorruptFileError(
                f"{origin} has format {found!r}, this version of pfm_llm reads {FORMAT}: "
                "use the version of pfm_llm that wrote it, or export the run again"
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise CorruptFileError(
                f"{origin} is damaged at {where}: {error.errors()[0]['msg']}"
            ) from error


@dataclass(frozen=True)
class Artefact:
    """A folder whose files match its manifest.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
        manifest_sha256: Hash of the manifest, which identifies the adapter.
        origin: The source, for messages: a Hub id with revision, or a folder.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    origin: str

    def table(self) -> ParameterTable:
        """The shared tensors that follow from the manifest; their learning rates have no meaning.

        The manifest lacks the widths of the base model, so they are taken from the files.
        """
        lora, manifest = self.lora(), self.manifest
        modules = {
            module: (_width(lora, module, "A"), _width(lora, module, "B"))
            for module in manifest.modules
        }
        sizes = Sizes(self.normaliser().mean.numel(), modules, manifest.num_items)
        config = ExperimentConfig.model_construct(
            name=manifest.name,
            adapters=manifest.adapters,
            head=manifest.head,
            tasks=manifest.tasks,
        )
        return parameter_table(config, sizes)

    def lora(self) -> dict[str, torch.Tensor]:
        """The shared LoRA, as it was stored, under the names of `types`."""
        return tensors_from_peft(files.read_tensors(self.folder / ADAPTER_FILE)[0])

    def shared_tensors(self) -> dict[str, torch.Tensor]:
        """LoRA, basis and head, float32, under the names of `types`."""
        tensors = self.lora()
        if BASIS_FILE in self.manifest.files:
            tensors |= files.read_tensors(self.folder / BASIS_FILE)[0]
        head, _ = read_head(self.folder)
        return {name: value.float() for name, value in {**tensors, **head}.items()}

    def normaliser(self) -> Normaliser:
        """The whitening that the head was trained with; never refitted."""
        return read_head(self.folder)[1]

    def item_keys(self) -> tuple[str, ...]:
        """A key per item of the catalogue that it was trained on; see `alignment.item_keys`."""
        keys = files.read_json(self.folder / ITEM_KEYS_FILE)
        if not isinstance(keys, list) or len(keys) != self.manifest.num_items:
            raise CorruptFileError(
                f"{self.folder / ITEM_KEYS_FILE} does not hold {self.manifest.num_items} keys"
            )
        return tuple(map(str, keys))

    def prompt(self) -> Prompt:
        """The prompt that it was trained with."""
        return load_prompt(str(self.folder / prompt_file(self.manifest.prompt)))


def _width(lora: Tensors, module: str, factor: str) -> int:
    """The dimension of a factor that is not the rank; 0 where there is no such factor."""
    found = lora.get(lora_name(module, factor))
    return found.shape["BA".index(factor)] if found is not None and found.dim() == 2 else 0


def read_artefact(folder: Path, origin: str | None = None) -> Artefact:
    """Read a folder and check every file against the manifest.

    Args:
        folder: An exported or pulled folder.
        origin: The source, for messages; None: the folder itself.

    Raises:
        ArtefactError: There is no manifest, or it lists a file that does not belong there.
        CorruptFileError: A file is missing or does not match the manifest.
    """
    origin = origin or str(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtefactError(
            f"{origin} has no {MANIFEST_FILE}: it is not a shared adapter that pfm_llm exported"
        )
    content = path.read_bytes()
    manifest = Manifest.from_bytes(content, f"{origin}: {MANIFEST_FILE}")
    check_listing(manifest, origin)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CorruptFileError(f"{origin}: {name} is missing; pull or export it again")
        if files.sha256_of(file) != expected:
            raise CorruptFileError(
                f"{origin}: {name} is not the file that the manifest lists (its SHA-256 differs); "
                "pull or export it again"
            )
    return Artefact(folder, manifest, hashlib.sha256(content).hexdigest(), origin)


def check_listing(manifest: Manifest, origin: str) -> None:
    """Check that a manifest lists all required files and no others.

    Raises:
        ArtefactError: A required file is not listed, or a listed file does not belong there.
    """
    for name in (*REQUIRED_FILES, prompt_file(manifest.prompt)):
        if name not in manifest.files:
            raise ArtefactError(f"{origin}: the manifest does not list {name}")
    for name in manifest.files:
        if not is_listed(name):
            raise ArtefactError(f"{origin}: {name} has no place in a shared adapter's folder")


def prompt_file(key: str) -> str:
    """The path in a folder of the prompt with this key."""
    return f"prompts/{key}.toml"


def is_listed(name: str, patterns: Sequence[str] = LISTED_FILES) -> bool:
    """Whether a relative path fits one of the patterns; by default, those of a manifest."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def write_head(folder: Path, head: Tensors, normaliser: Normaliser) -> None:
    """Write the recommender head and the whitening that it was trained with."""
    tensors = {**head, _MEAN: normaliser.mean, _BASIS: normaliser.basis}
    files.write_tensors(folder / HEAD_FILE, tensors)


def read_head(folder: Path) -> tuple[dict[str, torch.Tensor], Normaliser]:
    """The recommender head of a folder, and the whitening that it was trained with.

    Raises:
        CorruptFileError: The file is damaged or lacks the normaliser.
    """
    tensors, _ = files.read_tensors(folder / HEAD_FILE)
    try:
        normaliser = Normaliser(tensors.pop(_MEAN), tensors.pop(_BASIS))
    except KeyError as error:
        raise CorruptFileError(f"{folder / HEAD_FILE} lacks {error}; export it again") from error
    return tensors, normaliser
