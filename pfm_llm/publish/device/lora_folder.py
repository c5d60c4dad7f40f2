"""A LoRA as it stands in a PEFT folder: read, joined with another one, and written.

With a scale s, a layer of such a LoRA gives ``h = W x + s B A x``. Two of them are exactly one
whose factors are concatenated along the rank (PEFT's ``combination_type="cat"``)::

    h = W x + s B A x + s' B' A' x = W x + [s B, s' B'] [A; A'] x
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError
from pfm_llm.model.lora import EXPORTED_SETTINGS, names_from_peft, names_to_peft
from pfm_llm.model.private.part import Factors
from pfm_llm.protocol.types import lora_name
from pfm_llm.publish.artefact import ADAPTER_CONFIG_FILE, ADAPTER_FILE, PLAIN_LORA
from pfm_llm.publish.foreign import ForeignFolder

_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class FolderLora:
    """A plain LoRA.

    Attributes:
        base_name: The base model that it belongs to, as its folder names it.
        rank: The rank r of all modules.
        scale: The factor s.
        factors: By adapted module A [r, in] and B [out, r], float32.
    """

    base_name: str
    rank: int
    scale: float
    factors: Mapping[str, Factors]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The LoRA of a folder, whoever wrote it.

        Raises:
            ArtefactError: It is no plain LoRA of one rank, such as one with DoRA, biases or ranks
                by module; or a number is not finite.
            CorruptFileError: A file is missing or damaged.
        """
        source = ForeignFolder(folder, str(folder))
        tree = source.json(ADAPTER_CONFIG_FILE)
        tree = tree if isinstance(tree, dict) else {}
        for key, wanted in PLAIN_LORA.items():
            if (tree.get(key) or None) != wanted:
                raise ArtefactError(
                    f"{folder} has {key}: {tree.get(key)!r} in {ADAPTER_CONFIG_FILE}; only a plain "
                    f"LoRA ({key}: {wanted!r}) can be converted"
                )
        rank, alpha, name = (tree.get(key) for key in ("r", "lora_alpha", _BASE))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not name:
            raise ArtefactError(f"{folder}: {ADAPTER_CONFIG_FILE} lacks r, lora_alpha or {_BASE}")
        tensors = names_from_peft(source.tensors(ADAPTER_FILE))
        modules = {tensor.removeprefix("lora.")[:-2] for tensor in tensors}
        factors = {}
        for module in sorted(modules):
            a, b = (tensors.get(lora_name(module, factor)) for factor in "AB")
            if a is None or b is None or {len(a), *b.shape[1:]} != {rank} or a.dim() != 2:
                raise ArtefactError(
                    f"{folder}: {module} has no two factors of rank {rank}; export it again"
                )
            factors[module] = (a.float(), b.float())
        root = math.sqrt(rank) if tree.get("use_rslora") else rank
        return cls(str(name), rank, alpha / root, factors)

    def joined(self, other: Self) -> Self:
        """This LoRA and another one as a single one, of the sum of both ranks and scale 1.

        A module that only one of them adapts gets zeros for the other, as in PEFT.

        Raises:
            ArtefactError: They belong to different base models, or do not fit the same module.
        """
        if self.base_name != other.base_name:
            raise ArtefactError(
                f"one LoRA belongs to {self.base_name} and the other to {other.base_name}; join "
                "those of one base model"
            )
        found = {}
        for module in sorted({*self.factors, *other.factors}):
            a, b = self._part(module, other.factors.get(module))
            more_a, more_b = other._part(module, self.factors.get(module))
            if a.shape[1] != more_a.shape[1] or len(b) != len(more_b):
                raise ArtefactError(f"the two LoRAs give {module} different widths")
            found[module] = (torch.cat([a, more_a]), torch.cat([b, more_b], 1))
        return type(self)(self.base_name, self.rank + other.rank, 1.0, found)

    def write(self, folder: Path) -> None:
        """Write it as a PEFT folder that its owner alone can read.

        Raises:
            ConfigError: The folder holds other files than those of an adapter.
            StorageError: A file cannot be written.
        """
        files.make_own_dir(folder, {ADAPTER_CONFIG_FILE, ADAPTER_FILE})
        tree = dict.fromkeys(EXPORTED_SETTINGS) | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            _BASE: self.base_name,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,  # B has the scale
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted(self.factors),
        }
        tensors = {
            lora_name(module, factor): value
            for module in self.factors
            for factor, value in zip("AB", self._part(module), strict=True)
        }
        files.write_tensors(folder / ADAPTER_FILE, names_to_peft(tensors))
        files.write_json(folder / ADAPTER_CONFIG_FILE, tree)

    def _part(self, module: str, like: Factors | None = None) -> Factors:
        """A and s B of a module; zeros with the widths of ``like`` where it is not adapted."""
        if module in self.factors or like is None:
            a, b = self.factors[module]
            return a, b * self.scale
        a, b = like
        return a.new_zeros(self.rank, a.shape[1]), b.new_zeros(len(b), self.rank)
