"""Shared adapters' folders of a few kilobytes, with random tensors and nothing trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pfm_llm.base import files
from pfm_llm.config.choices import ItemIds
from pfm_llm.config.model import (
    AdaptersConfig,
    HeadConfig,
    ItemsConfig,
    PrivateAdapterConfig,
    SharedAdapterConfig,
    WindowConfig,
)
from pfm_llm.model.head import ITEM_BIAS, ITEM_IDS, ITEM_IDS_OUT, ITEM_PROJ, STATE_LOG_N, STATE_PROJ
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.protocol.types import Tensors
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    HEAD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TRAINING_CONFIG_FILE,
    Artefact,
    prompt_file,
    read_artefact,
    write_head,
)
from pfm_llm.publish.manifest import FORMAT, Base, Manifest, Metric, Parent
from pfm_llm.publish.signing import SigningKey, sign
from pfm_llm.text.prompts import load_prompt

MODULES = ("model.layers.9.self_attn.q_proj", "model.layers.10.mlp.up_proj")
PROMPT = "next_item.v1"
ITEMS = tuple(f"key-{index}" for index in range(6))
HIDDEN, DIM, ID_DIM = 8, 4, 3


def random_lora(seed: int, rank: int = 2, modules: Sequence[str] = MODULES) -> Tensors:
    """Factors under our names, for modules of 8 inputs and 12 outputs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"lora.{module}.A"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"lora.{module}.B"] = torch.randn(12, rank, generator=generator)
    return tensors


def random_head(seed: int, num_items: int = len(ITEMS)) -> dict[str, torch.Tensor]:
    """The parameters of a head."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = {
        STATE_PROJ: (DIM, HIDDEN),
        STATE_LOG_N: (1,),
        ITEM_PROJ: (DIM, DIM),
        ITEM_BIAS: (num_items,),
        ITEM_IDS: (num_items, ID_DIM),
        ITEM_IDS_OUT: (DIM, ID_DIM),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_artefact(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 2,
    lora: Tensors | None = None,
    head: Tensors | None = None,
    items: Sequence[str] = ITEMS,
    key: SigningKey | None = None,
    **manifest: Any,
) -> Artefact:
    """Write a folder.

    Args:
        folder: Where to.
        seed: Of all its tensors; also the round, and makes the metric.
        rank: Of the LoRA; alpha is 4.
        lora: Factors under our names, instead of random ones.
        head: Parameters, instead of random ones.
        items: Keys of the items.
        key: To sign with.
        **manifest: Fields of the manifest to replace.
    """
    lora = random_lora(seed, rank) if lora is None else lora
    head = random_head(seed, len(items)) if head is None else head
    peft = {
        f"base_model.model.{name.removeprefix('lora.')[:-2]}.lora_{name[-1]}.weight": tensor
        for name, tensor in lora.items()
    }
    files.write_json(folder / ADAPTER_CONFIG_FILE, {"peft_type": "LORA", "r": rank})
    files.write_tensors(folder / ADAPTER_FILE, peft)
    write_head(folder, head, Normaliser(torch.zeros(HIDDEN), torch.eye(HIDDEN)))
    files.write_text(folder / ITEM_KEYS_FILE, json.dumps(list(items)) + "\n")
    files.write_text(folder / prompt_file(PROMPT), load_prompt(PROMPT).toml)
    files.write_text(folder / TRAINING_CONFIG_FILE, f"name: small\nseed: {seed}\n")
    card = f"---\nlicense: apache-2.0\n---\n# Small, round {seed}\n"
    files.write_text(folder / CARD_FILE, card)
    names = [ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, ITEM_KEYS_FILE, TRAINING_CONFIG_FILE]
    hashes = {name: files.sha256_of(folder / name) for name in (*names, prompt_file(PROMPT))}
    fields = small_manifest(seed, rank, tuple(lora), len(items), hashes)
    fields = fields.model_copy(update={"head": settings_of(head)})
    write_manifest(folder, fields.model_copy(update=manifest), key)
    return read_artefact(folder)


def settings_of(head: Tensors) -> HeadConfig:
    """The settings of a head with these parameters."""
    return HeadConfig(
        dim=len(head[STATE_PROJ]),
        item_bias=ITEM_BIAS in head,
        item_ids=ItemIds.OUTPUT if ITEM_IDS in head else ItemIds.NONE,
        id_dim=ID_DIM,
        item_context=False,
        item_met=False,
        prior_events=5.0 if STATE_LOG_N in head else None,
    )


def write_manifest(folder: Path, manifest: Manifest, key: SigningKey | None = None) -> None:
    """Write a manifest, and its signature or none."""
    files.write_bytes(folder / MANIFEST_FILE, manifest.to_bytes())
    (folder / SIGNATURE_FILE).unlink(missing_ok=True)
    if key is not None:
        files.write_bytes(folder / SIGNATURE_FILE, sign(manifest.to_bytes(), key))


def contents(folder: Path) -> dict[str, bytes]:
    """Path to content of all files of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def follows(repo: str, head: tuple[Manifest, str, str] | None) -> tuple[Parent, ...]:
    """The parents of a version that is pushed upon this head."""
    if head is None:
        return ()
    _, sha256, commit = head
    return (Parent(relation="previous", manifest_sha256=sha256, repo=repo, revision=commit),)


def small_manifest(
    seed: int, rank: int, names: Sequence[str], num_items: int, hashes: dict[str, str]
) -> Manifest:
    """A manifest whose hashes, but for those of the files, are of nothing."""
    value = 0.1 + seed / 100
    metric = Metric(
        mode="shared_only", metric="ndcg@10", value=value, ci_low=value - 0.01, ci_high=value + 0.01
    )
    shared = SharedAdapterConfig(rank=rank, alpha=4)
    private = PrivateAdapterConfig(enabled=False)
    return Manifest(
        format=FORMAT,
        pfm_llm="0.0.0",
        name="small",
        round=seed,
        base=Base(
            name="someone/base",
            embedded=None,
            revision=None,
            dtype="float32",
            weights_sha256="b" * 64,
            tokenizer_sha256="c" * 64,
        ),
        adapters=AdaptersConfig(shared=shared, private=private),
        modules=tuple(sorted({name[5:-2] for name in names})),
        head=HeadConfig(dim=DIM, id_dim=ID_DIM, item_met=False),
        window=WindowConfig(),
        items=ItemsConfig(encoder="backbone"),
        item_encoder_sha256=None,
        prompt=PROMPT,
        prompt_sha256=load_prompt(PROMPT).content_hash(),
        data_source="ml-100k",
        catalogue_sha256="d" * 64,
        num_items=num_items,
        contract_sha256="e" * 64,
        metrics=(metric,),
        files=hashes,
    )
