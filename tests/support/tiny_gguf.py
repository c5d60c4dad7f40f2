"""A small Llama as the GGUF file that llama.cpp loads, with the names and the order of its rows."""

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def write_base(path: Path, model: Any) -> Path:
    """Write a `LlamaForCausalLM` with a made-up vocabulary; give it token ids."""
    config: LlamaConfig = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        rows = heads.get(module.rpartition(".")[2])
        weight = value if rows is None else pairwise(value, rows)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", weight.float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_saved_base(path: Path, folder: Path) -> Path:
    """`write_base` of a saved model."""
    return write_base(path, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def pairwise(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i + j of a head is row i + j d/2 of it, spelt out."""
    size = len(weight) // heads
    half = size // 2
    rows = [h * size + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
    return weight[torch.tensor(rows)]
