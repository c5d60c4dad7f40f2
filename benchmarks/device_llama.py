"""llama.cpp as a device has it: a GGUF file, some LoRAs, and answers by request.

Nothing here imports pfm_llm. Needs the extra [device].
"""

import json
import math
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

_ABOVE_ALL = 100.0
"""Added to the logits of both answers, so that the sampler sees these two alone."""


class Llama:
    """A language model in llama.cpp with LoRAs that each request weighs for itself.

    Args:
        base: The GGUF file of the language model.
        loras: GGUF files of LoRAs; a request names them by their place here.
        slots: How many requests are answered at a time.
        exact: Keep keys and values in float32, and do without flash attention.
    """

    def __init__(
        self, base: Path, loras: Sequence[Path], slots: int = 1, exact: bool = False
    ) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(one), 0.0) for one in loras]
        params.n_ctx, params.n_parallel = 1024 * slots, slots
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, 0
        params.cache_ram_mib = 0  # no states of earlier requests, which had other LoRAs
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._count = len(loras)
        self._server = xllamacpp.Server(params)

    def log_odds(
        self, prompts: Sequence[list[int]], answers: tuple[int, int], scales: Mapping[int, float]
    ) -> list[float]:
        """Log-odds of the first answer against the second one, after each prompt.

        Args:
            prompts: Token ids; what they have in common at the start is read once.
            answers: The tokens of yes and of no.
            scales: Place of a LoRA to its factor; others do not take part.
        """
        found = self._server.handle_completions(
            {
                "prompt": list(prompts),
                "n_predict": 1,
                "n_probs": 2,
                "post_sampling_probs": True,
                "samplers": ["top_k"],
                "top_k": 2,
                "logit_bias": [[token, _ABOVE_ALL] for token in answers],
                "lora": [{"id": i, "scale": scales.get(i, 0.0)} for i in range(self._count)],
            }
        )
        if "choices" not in found:
            raise RuntimeError(f"llama.cpp says: {found}")
        return [_log_odds(choice["logprobs"]["content"][0], answers) for choice in found["choices"]]

    def tokenise(self, text: str) -> list[int]:
        """The tokens of a text, by llama.cpp's own tokenizer."""
        body = {"content": text, "add_special": False, "parse_special": False}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens


def _log_odds(content: Any, answers: tuple[int, int]) -> float:
    probabilities = {one["id"]: one["prob"] for one in content["top_probs"]}
    yes, no = (probabilities[token] for token in answers)
    return math.log(yes) - math.log(no)


def dequantise(source: Path, target: Path, half: bool = False) -> None:
    """Write a language model's GGUF file with all of its weights in float32.

    Args:
        source: The file.
        target: The file to write.
        half: Matrices are written in float16 instead.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        items = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], items)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_F16 if half else kinds.ALL_F32)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        is_half = half and weight.ndim > 1
        writer.add_tensor(tensor.name, weight.astype(np.float16) if is_half else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
