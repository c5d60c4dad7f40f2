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
``recommender_head.safetensors``      the head, the catalogue's whitening, and with codes of texts
                                      their centroids
``private_basis.safetensors``         what private parts are made with: the basis of all
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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pfm_llm.base import files
from pfm_llm.base.errors import (
    ArtefactError,
    BackboneError,
    ConfigError,
    ContractError,
    CorruptFileError,
)
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.model.items.codes import centroid_shape
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.model.lora import names_from_peft
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.parameters import ParameterTable, Sizes
from pfm_llm.protocol.types import Group, Tensors, lora_name, of_group
from pfm_llm.publish.foreign import MAX_TENSOR_BYTES, ForeignFolder
from pfm_llm.publish.manifest import MAX_MANIFEST_BYTES, Manifest
from pfm_llm.text.prompts import MAX_PROMPT_BYTES, Prompt, load_prompt

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

_MEBI = 1 << 20
SIZE_LIMITS = {
    ADAPTER_CONFIG_FILE: _MEBI,
    ADAPTER_FILE: MAX_TENSOR_BYTES,
    HEAD_FILE: MAX_TENSOR_BYTES,
    ITEM_KEYS_FILE: 512 * _MEBI,
    BASIS_FILE: MAX_TENSOR_BYTES,
    PROMPT_FILES: MAX_PROMPT_BYTES,
    TRAINING_CONFIG_FILE: _MEBI,
    PLOT_FILES: 32 * _MEBI,
    MANIFEST_FILE: MAX_MANIFEST_BYTES,
    SIGNATURE_FILE: _MEBI,
    CARD_FILE: 4 * _MEBI,
}
"""Pattern of each file of a published folder, and its largest size in bytes."""

REQUIRED_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, ITEM_KEYS_FILE)
LISTED_FILES = (*REQUIRED_FILES, BASIS_FILE, PROMPT_FILES, TRAINING_CONFIG_FILE, PLOT_FILES)
"""Patterns of the files that a manifest may list. A published folder holds only these, the
manifest, its signature and the card."""

PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layer_replication")),
    **dict.fromkeys(("use_dora", "lora_bias", "auto_mapping")),
}
"""Settings by which PEFT would save more than a LoRA, or read it differently. Absent means None."""

_MEAN, _BASIS = "normaliser.mean", "normaliser.basis"
_ITEM_MEAN, _ITEM_BASIS = "item_normaliser.mean", "item_normaliser.basis"
_CENTROIDS = "codes.centroids"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_MAX_KEY = 200


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

    @property
    def files(self) -> ForeignFolder:
        """The folder as a source of bounded reads."""
        return ForeignFolder(self.folder, self.origin)

    def table(self) -> ParameterTable:
        """The shared tensors that follow from the manifest; their learning rates have no meaning.

        The manifest lacks the widths of the base model, so they are taken from the files.

        Raises:
            ArtefactError: No model has such settings.
            CorruptFileError: A header is damaged.
        """
        return self._table(self._specs())

    def contents(self) -> tuple[dict[str, torch.Tensor], tuple[Normaliser, Normaliser]]:
        """LoRA, basis and head, float32, under the names of `types`; and the head's whitenings.

        Each file holds exactly the tensors that follow from the manifest, and all are finite. The
        whitenings, of user states and of items, are never refitted. They are one where the file has
        one: then items and user states share a space.

        Raises:
            ArtefactError: A file holds other tensors or shapes, or a number that is not finite.
            CorruptFileError: A file is damaged.
        """
        found = self._specs()
        specs = self._table(found).specs
        whitening = _whitening(found[HEAD_FILE], _MEAN, _BASIS)
        if _ITEM_MEAN in found[HEAD_FILE]:
            whitening |= _whitening(found[HEAD_FILE], _ITEM_MEAN, _ITEM_BASIS)
        fitted = whitening | self._centroids()
        groups: dict[str, Mapping[str, TensorSpec]] = {
            ADAPTER_FILE: of_group(specs, Group.LORA),
            HEAD_FILE: {**of_group(specs, Group.HEAD), **fitted},
            BASIS_FILE: of_group(specs, Group.BASIS),
        }
        if bool(groups[BASIS_FILE]) != (BASIS_FILE in found):
            problem = "missing" if groups[BASIS_FILE] else "of no use here"
            raise ArtefactError(f"{self.origin}: {BASIS_FILE} is {problem}; export it again")
        for name, wanted in groups.items():
            self.files.check(name, found.get(name, {}), wanted)
        tensors = names_from_peft(self.files.tensors(ADAPTER_FILE))
        for name in found.keys() - {ADAPTER_FILE}:
            tensors |= self.files.tensors(name)
        normaliser = of_items = Normaliser(tensors.pop(_MEAN), tensors.pop(_BASIS))
        if _ITEM_MEAN in tensors:
            of_items = Normaliser(tensors.pop(_ITEM_MEAN), tensors.pop(_ITEM_BASIS))
        tensors.pop(_CENTROIDS, None)
        return tensors, (normaliser, of_items)

    def code_centroids(self) -> torch.Tensor | None:
        """The centroids of the codes of texts, float32 [T, S, w]; None where it has none.

        Raises:
            ArtefactError: A number is not finite.
            CorruptFileError: The file is damaged.
        """
        return self.files.tensors(HEAD_FILE).get(_CENTROIDS) if self._centroids() else None

    def _centroids(self) -> dict[str, TensorSpec]:
        """The centroids that follow from the manifest."""
        head = self.manifest.head
        if head.codes is None or not head.codes.text_books:
            return {}
        return {_CENTROIDS: TensorSpec(centroid_shape(head.codes, head.dim))}

    def shared_tensors(self) -> dict[str, torch.Tensor]:
        """The first of `contents`."""
        return self.contents()[0]

    def item_keys(self) -> tuple[str, ...]:
        """A key per item of the catalogue that it was trained on; see `alignment.item_keys`.

        Raises:
            CorruptFileError: The file does not hold as many keys, each a short text and no two the
                same.
        """
        keys = self.files.json(ITEM_KEYS_FILE, SIZE_LIMITS[ITEM_KEYS_FILE])
        count = self.manifest.num_items
        short = isinstance(keys, list) and all(
            isinstance(key, str) and len(key) <= _MAX_KEY and key.isprintable() for key in keys
        )
        if not short or len(set(keys)) != count or len(keys) != count:
            raise CorruptFileError(f"{self.origin}: {ITEM_KEYS_FILE} does not hold {count} keys")
        return tuple(keys)

    def prompt(self) -> Prompt:
        """The prompt that it was trained with.

        Raises:
            ArtefactError: The file holds another one.
            CorruptFileError: The file is no prompt.
        """
        name = prompt_file(self.manifest.prompt)
        self.files.read(name, MAX_PROMPT_BYTES)
        try:
            prompt = load_prompt(str(self.folder / name))
        except ConfigError as error:
            raise CorruptFileError(f"{self.origin}: {error}; pull or export it again") from error
        if prompt.content_hash() != self.manifest.prompt_sha256:
            raise ArtefactError(
                f"{self.origin}: prompt {self.manifest.prompt} is not the one that was trained "
                "with; pull or export it again"
            )
        return prompt

    def training_settings(self) -> dict[str, Any]:
        """The settings of the training; empty where the folder does not have them.

        Raises:
            CorruptFileError: The file is no YAML of settings.
        """
        if TRAINING_CONFIG_FILE not in self.manifest.files:
            return {}
        tree = self.files.yaml(TRAINING_CONFIG_FILE)
        if not isinstance(tree, dict):
            raise CorruptFileError(f"{self.origin}: {TRAINING_CONFIG_FILE} holds no settings")
        return tree

    def _specs(self) -> dict[str, dict[str, TensorSpec]]:
        """The tensors that the header of each tensor file states, under the names of `types`."""
        names = [HEAD_FILE, *({BASIS_FILE} & self.manifest.files.keys())]
        lora = names_from_peft(self.files.specs(ADAPTER_FILE))
        return {ADAPTER_FILE: lora, **{name: self.files.specs(name) for name in names}}

    def _table(self, found: Mapping[str, Mapping[str, TensorSpec]]) -> ParameterTable:
        manifest, lora = self.manifest, found[ADAPTER_FILE]
        modules = {
            module: (
                _width(lora, lora_name(module, "A"), 1),
                _width(lora, lora_name(module, "B"), 0),
            )
            for module in manifest.modules
        }
        hidden = _width(found[HEAD_FILE], _MEAN, 0)
        if not hidden:
            raise ArtefactError(f"{self.origin}: {HEAD_FILE} lacks {_MEAN}; export it again")
        of_items = _width(found[HEAD_FILE], _ITEM_MEAN, 0) or None
        sizes = Sizes(hidden, modules, manifest.num_items, of_items)
        config = ExperimentConfig.model_construct(
            name=manifest.name,
            adapters=manifest.adapters,
            head=manifest.head,
            tasks=manifest.tasks,
        )
        try:
            return parameter_table(config, sizes)
        except (BackboneError, ConfigError, ContractError) as error:
            raise ArtefactError(
                f"{self.origin}: no model has the settings of its manifest: {error}"
            ) from error


def _whitening(specs: Mapping[str, TensorSpec], mean: str, basis: str) -> dict[str, TensorSpec]:
    """The tensors of a whitening, of the width that its mean has."""
    width = _width(specs, mean, 0)
    return {mean: TensorSpec((width,)), basis: TensorSpec((width, width))}


def _width(specs: Mapping[str, TensorSpec], name: str, dimension: int) -> int:
    """A dimension of a tensor; 0 where there is no such tensor or dimension."""
    shape = specs[name].shape if name in specs else ()
    return shape[dimension] if len(shape) > dimension else 0


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
    source = ForeignFolder(folder, origin)
    if not source.has(MANIFEST_FILE):
        raise ArtefactError(
            f"{origin} has no {MANIFEST_FILE}: it is not a shared adapter that pfm_llm exported"
        )
    content = source.read(MANIFEST_FILE, SIZE_LIMITS[MANIFEST_FILE])
    manifest = Manifest.from_bytes(content, f"{origin}: {MANIFEST_FILE}")
    check_listing(manifest, origin)
    for name, expected in manifest.files.items():
        if source.sha256(name, size_limit(name)) != expected:
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
        if not is_listed(name) or not _NAME.fullmatch(name):
            raise ArtefactError(f"{origin}: {name} has no place in a shared adapter's folder")
    if len({name.lower() for name in manifest.files}) < len(manifest.files):
        raise ArtefactError(f"{origin}: the manifest lists two files whose names differ in case")


def prompt_file(key: str) -> str:
    """The path in a folder of the prompt with this key."""
    return f"prompts/{key}.toml"


def size_limit(name: str) -> int:
    """The largest size, in bytes, of a file that a published folder may hold."""
    return next(limit for pattern, limit in SIZE_LIMITS.items() if is_listed(name, [pattern]))


def is_listed(name: str, patterns: Sequence[str] = LISTED_FILES) -> bool:
    """Whether a relative path fits one of the patterns; by default, those of a manifest."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def write_head(
    folder: Path,
    head: Tensors,
    normaliser: Normaliser,
    of_items: Normaliser | None = None,
    centroids: torch.Tensor | None = None,
) -> None:
    """Write the recommender head, its whitenings and the centroids of its codes.

    Args:
        folder: Where to.
        head: Its tensors.
        normaliser: The whitening of user states.
        of_items: That of items; None, or the same object: items share it.
        centroids: Of the codes of texts, float32 [T, S, w]; None without any.
    """
    tensors = {**head, _MEAN: normaliser.mean, _BASIS: normaliser.basis}
    if of_items is not None and of_items is not normaliser:
        tensors |= {_ITEM_MEAN: of_items.mean, _ITEM_BASIS: of_items.basis}
    if centroids is not None:
        tensors[_CENTROIDS] = centroids
    files.write_tensors(folder / HEAD_FILE, tensors)
