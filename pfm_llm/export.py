"""The shared adapter as an artefact: a plain PEFT folder, our head beside it, a manifest, a card.

Built from an allow-list; nothing that is private is ever at hand here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pfm_llm import __version__, files
from pfm_llm.assembly import Assembly
from pfm_llm.cohort_model import BASIS, SHARED_LORA
from pfm_llm.errors import CorruptFileError
from pfm_llm.head import Normaliser
from pfm_llm.model_card import CardFacts, model_card
from pfm_llm.run_report import ResultRow, results_table
from pfm_llm.types import SharedState

HEAD_FILE = "recommender_head.safetensors"
BASIS_FILE = "private_basis.safetensors"
MANIFEST_FILE = "pfm_manifest.json"
CARD_FILE = "README.md"
FORMAT = 1

_MEAN, _BASIS = "normaliser.mean", "normaliser.basis"
_EMBEDDED_NOTE = (
    "The weights that it was trained on are those of this model's Q4_1 GGUF file, dequantised "
    "(`pfm_llm.assets.smollm2_135m()` rebuilds them); the manifest holds their hash."
)


def export_shared_adapter(
    assembly: Assembly,
    folder: Path,
    shared: SharedState,
    round_number: int,
    rows: Sequence[ResultRow],
) -> None:
    """Write the shared adapter's folder; files of an earlier export are replaced.

    Args:
        assembly: The experiment.
        folder: Where to.
        shared: The shared state.
        round_number: After which round it stands.
        rows: Results for the card.
    """
    lora = {n: t for n, t in shared.tensors.items() if n.startswith(SHARED_LORA)}
    head = {n: t for n, t in shared.tensors.items() if n.startswith("head.")}
    basis = {n: t for n, t in shared.tensors.items() if n.startswith(BASIS)}
    assembly.adapter.export_shared(lora, folder, assembly.backbone.portable_name)
    head |= {_MEAN: assembly.normaliser.mean, _BASIS: assembly.normaliser.basis}
    hashes = {HEAD_FILE: files.write_tensors(folder / HEAD_FILE, head)}
    if basis:
        hashes[BASIS_FILE] = files.write_tensors(folder / BASIS_FILE, basis)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        hashes[name] = files.sha256_of(folder / name)
    manifest = _manifest(assembly, round_number, rows)
    files.write_json(folder / MANIFEST_FILE, {**manifest, "files": hashes})
    config = assembly.config
    facts = CardFacts(
        name=config.name,
        base_model=assembly.backbone.portable_name,
        prompt=assembly.prompt.key,
        dataset=config.data.source,
        rounds=round_number,
        scores=rows,
        results_table=results_table(rows, confidence=config.evaluation.confidence),
        config=config.model_dump(mode="json"),
        base_note=_EMBEDDED_NOTE if assembly.backbone.is_embedded else "",
    )
    files.write_text(folder / CARD_FILE, model_card(facts))


def read_head(folder: Path) -> tuple[dict[str, torch.Tensor], Normaliser]:
    """The recommender head of an exported folder, and the whitening that it was trained with.

    Raises:
        CorruptFileError: The file is damaged or lacks the normaliser.
    """
    tensors, _ = files.read_tensors(folder / HEAD_FILE)
    try:
        normaliser = Normaliser(tensors.pop(_MEAN), tensors.pop(_BASIS))
    except KeyError as error:
        raise CorruptFileError(f"{folder / HEAD_FILE} lacks {error}; export it again") from error
    return tensors, normaliser


def _manifest(assembly: Assembly, round_number: int, rows: Sequence[ResultRow]) -> dict[str, Any]:
    catalogue = assembly.corpus.interactions.catalogue
    adapters = assembly.config.adapters
    return {
        "format": FORMAT,
        "pfm_llm": __version__,
        "round": round_number,
        "base": {
            "name": assembly.backbone.portable_name,
            "weights_sha256": assembly.backbone.weights_hash,
            "tokenizer_sha256": assembly.backbone.tokenizer_hash,
        },
        "adapter": {
            "rank": adapters.shared.rank,
            "alpha": adapters.shared.alpha,
            "modules": list(assembly.adapter.modules),
        },
        "prompt": {
            "key": assembly.prompt.key,
            "sha256": assembly.prompt.content_hash(),
        },
        "catalogue": {
            "sha256": catalogue.content_hash(),
            "num_items": len(catalogue),
            "item_ids_sha256": hashlib.sha256(
                json.dumps(list(catalogue.item_ids)).encode()
            ).hexdigest(),
        },
        "contract_sha256": assembly.contract.hash(),
        "metrics": [
            {"mode": row.mode, "metric": f"{row.metric}@{row.k}", "value": row.value}
            for row in rows
            if row.method == "pfm" and row.split == "test" and row.candidates == "full"
        ],
    }
