"""A LoRA as a GGUF file, for llama.cpp, beside the GGUF file of its base model.

llama.cpp adds ``(alpha / r) B A x`` for each adapter of a request, times the request's own scale
for it. So alpha is r times the scale of the LoRA. (llama.cpp's converter writes PEFT's alpha, which
is another one with ``use_rslora``.) Modules have the names of the base model's file.

The rows of a B stand in the order in which that file has the rows of its weights. Rotary positions
pair rows i and i + d/2 of a head in transformers. In llama.cpp they pair rows 2i and 2i + 1 where
the architecture is among ``_REORDERED``.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gguf
import torch

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CorruptFileError
from pfm_llm.model.private.part import Factors
from pfm_llm.publish.device.lora_folder import FolderLora

_REORDERED = {"llama": {"attn_q": "head_count", "attn_k": "head_count_kv"}}
"""By architecture the modules whose rows another order, and the key of their number of heads."""
_AS_THEY_ARE = ("qwen2", "qwen3", "gemma2", "gemma3")
ARCHITECTURES = (*_REORDERED, *_AS_THEY_ARE)
"""Those of llama.cpp whose LoRAs can be written; Mistral models are ``llama`` there."""


@dataclass(frozen=True)
class GgufBase:
    """What a LoRA needs to know of its base model's GGUF file.

    Attributes:
        origin: The file.
        architecture: One of `ARCHITECTURES`.
        num_layers: How many layers it has.
        heads: By module (``attn_q``) its number of heads, where its rows have another order.
        widths: By name of a weight (``blk.0.attn_q.weight``) its in and out features.
    """

    origin: Path
    architecture: str
    num_layers: int
    heads: dict[str, int]
    widths: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The description of a base model's file; its weights are not read.

        Raises:
            ArtefactError: It is of another architecture than `ARCHITECTURES`.
            CorruptFileError: It is no GGUF file of a language model.
        """
        try:
            reader = gguf.GGUFReader(path)
            architecture = str(_value(reader, "general.architecture"))
            if architecture not in ARCHITECTURES:
                raise ArtefactError(
                    f"{path} has the architecture {architecture}, whose order of rows is not known "
                    f"here ({', '.join(ARCHITECTURES)} are); convert the PEFT folder with "
                    "llama.cpp's convert_lora_to_gguf.py"
                )
            heads = {
                module: int(_value(reader, f"{architecture}.attention.{key}"))
                for module, key in _REORDERED.get(architecture, {}).items()
            }
            num_layers = int(_value(reader, f"{architecture}.block_count"))
            widths = {one.name: tuple(map(int, one.shape)) for one in reader.tensors}
        except (OSError, ValueError, IndexError, KeyError, TypeError, UnicodeError) as error:
            raise CorruptFileError(
                f"{path} is no GGUF file of a language model ({error}); name the file that "
                "llama.cpp is to load"
            ) from error
        return cls(path, architecture, num_layers, heads, widths)

    def placed(self, lora: FolderLora) -> Iterator[tuple[str, Factors]]:
        """The factors of a LoRA by the names of the weights that they change, B in their order.

        Raises:
            ArtefactError: The file has no such weight, or one of other widths.
        """
        architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(architectures[self.architecture], self.num_layers)
        for module, (a, b) in lora.factors.items():
            place = names.get_name(module)
            found = self.widths.get(f"{place}.weight")
            if place is None or found != (a.shape[1], len(b)):
                has = "no such weight" if found is None else f"{found[0]} to {found[-1]}"
                raise ArtefactError(
                    f"the LoRA is no LoRA of {self.origin}: it adapts {module}, {a.shape[1]} to "
                    f"{len(b)}, and the file has {has}; name the GGUF file of {lora.base_name}"
                )
            heads = self.heads.get(place.rpartition(".")[2])
            yield f"{place}.weight", (a, b if heads is None else _pairwise(b, heads))


def write_gguf(lora: FolderLora, base: GgufBase, path: Path, description: str) -> None:
    """Write a LoRA as a GGUF file that its owner alone can read; an earlier one is replaced.

    Args:
        lora: The LoRA.
        base: The base model's file.
        path: The file to write, in a folder that exists.
        description: What it is, for whoever looks into the file.

    Raises:
        ArtefactError: It is no LoRA of the base model.
        StorageError: The file cannot be written.
    """
    placed = dict(base.placed(lora))
    with (
        files.storage_errors(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf.") as scratch,
    ):
        whole = Path(scratch) / path.name
        with contextlib.closing(gguf.GGUFWriter(whole, base.architecture)) as writer:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_description(description)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scale * lora.rank)
            for name, factors in placed.items():
                for factor, value in zip("ab", factors, strict=True):
                    writer.add_tensor(f"{name}.lora_{factor}", value.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        files.write_bytes(path, whole.read_bytes())


def _pairwise(b: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of B [out, r], each head's two halves of rows one by one in turn."""
    halves = b.reshape(heads, 2, len(b) // heads // 2, b.shape[1])
    return halves.transpose(1, 2).reshape(b.shape)


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    """A number or a text of the header."""
    field = reader.fields[key]
    value = field.parts[field.data[0]]
    is_text = field.types[0] is gguf.GGUFValueType.STRING
    return bytes(value).decode() if is_text else value[0]
