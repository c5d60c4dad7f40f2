"""The shared adapter of a run as an artefact: a plain PEFT folder, our head, a manifest, a card.

The files follow an allow-list. This module has no access to private data.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfm_llm import __version__
from pfm_llm.base import files
from pfm_llm.base.errors import ConfigError
from pfm_llm.base.terminal import harmless
from pfm_llm.config.model import HeadConfig
from pfm_llm.config.schema import ExperimentConfig, dump_config
from pfm_llm.config.settings import learns_met
from pfm_llm.data.interactions import Catalogue
from pfm_llm.evaluation.results import FULL, ResultRow
from pfm_llm.model.build import ModelParts
from pfm_llm.protocol.types import Group, Mode, SharedState, of_group
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASIS_FILE,
    CARD_FILE,
    HEAD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    TRAINING_CONFIG_FILE,
    prompt_file,
    write_head,
)
from pfm_llm.publish.card import Shown, model_card, shown_name
from pfm_llm.publish.manifest import FORMAT, Base, Manifest, Metric, Parent, Privacy
from pfm_llm.server.privacy.mechanism import Spent
from pfm_llm.text.item_keys import item_keys

PLOTS_FOLDER = "plots"


@dataclass(frozen=True)
class Exported:
    """The experiment of an exported adapter.

    Attributes:
        config: The experiment.
        parts: The model.
        catalogue: Its items.
        parents: The adapter that the training started from; empty for a new model.
        privacy: What the training has spent; None: there was no noise.
    """

    config: ExperimentConfig
    parts: ModelParts
    catalogue: Catalogue
    parents: tuple[Parent, ...] = ()
    privacy: Spent | None = None


def export_shared_adapter(
    what: Exported,
    folder: Path,
    shared: SharedState,
    rows: Sequence[ResultRow] = (),
) -> None:
    """Write the shared adapter's folder; files of an earlier export are replaced.

    Under privacy the folder has neither results nor plots: they tell of users without noise.

    Args:
        what: Config, model and catalogue.
        folder: The folder to write; the plots of its parent folder are copied into it.
        shared: The shared state.
        rows: Results for manifest and card; empty before the evaluation.

    Raises:
        ConfigError: It is not known what the training has spent under privacy.
    """
    parts, config = what.parts, what.config
    if config.federation.privacy is not None and what.privacy is None:
        raise ConfigError(
            f"{config.name}: its ledger of privacy, privacy.json, is missing, so nobody knows what "
            "the training has spent; restore it beside the checkpoints"
        )
    rows = () if what.privacy else rows
    parts.adapter.export_shared(shared.tensors, folder, parts.backbone.portable_name)
    head = of_group(shared.tensors, Group.HEAD)
    centroids = None if parts.codes is None else parts.codes.centroids
    write_head(folder, head, parts.normaliser, parts.item_normaliser, centroids)
    if basis := of_group(shared.tensors, Group.BASIS):
        files.write_tensors(folder / BASIS_FILE, basis)
    keys = item_keys(what.catalogue, parts.prompt)
    texts = {
        ITEM_KEYS_FILE: json.dumps(keys) + "\n",
        TRAINING_CONFIG_FILE: dump_config(public_config(config)),
        prompt_file(parts.prompt.key): parts.prompt.toml,
    }
    for name, text in texts.items():
        files.write_text(folder / name, text)
    plots = _copy_plots(folder.parent / PLOTS_FOLDER, folder, with_any=what.privacy is None)
    names = [ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, *([BASIS_FILE] if basis else ())]
    names += [*texts, *plots]
    hashes = {name: files.sha256_of(folder / name) for name in names}
    manifest = _manifest(what, shared.round_number, rows, hashes)
    files.write_bytes(folder / MANIFEST_FILE, manifest.to_bytes())
    base, prompt = parts.backbone.portable_name, parts.prompt.key
    card = model_card(config, base, prompt, shared.round_number, Shown(rows, plots, what.privacy))
    files.write_text(folder / CARD_FILE, card)


def public_config(config: ExperimentConfig) -> ExperimentConfig:
    """The config without paths of this machine: each path becomes its last part."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["data"]["source"] = shown_name(tree["data"]["source"])
    tree["data"]["items"] = tree["data"]["items"] and shown_name(tree["data"]["items"])
    if hub := tree["data"].get("hub"):
        for table in (hub, hub.get("items") or {}):
            table |= {key: _shown(table[key]) for key in ("name", "files") if table.get(key)}
        hub["name"] = tree["data"]["source"]
    tree["backbone"]["name"] = shown_name(tree["backbone"]["name"])
    tree["prompt"] = shown_name(tree["prompt"])
    if tree["init_from"]:
        tree["init_from"]["adapter"] = shown_name(tree["init_from"]["adapter"])
    for section in ("cache", "output", "push_to_hub"):
        tree.pop(section)
    return ExperimentConfig.model_validate(tree)


def _shown(names: Any) -> Any:
    """Names or paths at any depth, each as its last part where it is of this machine."""
    if isinstance(names, dict):
        return {key: _shown(value) for key, value in names.items()}
    return shown_name(names) if isinstance(names, str) else [_shown(name) for name in names]


def _copy_plots(source: Path, folder: Path, with_any: bool) -> list[str]:
    """Copy the run's plots, if any are wanted, into the folder; return their names in it."""
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)
    names = []
    for plot in sorted(source.glob("*.png")) if with_any else ():
        names.append(f"{PLOTS_FOLDER}/{plot.name}")
        files.write_bytes(folder / names[-1], plot.read_bytes())
    return names


def _manifest(
    what: Exported, round_number: int, rows: Sequence[ResultRow], hashes: dict[str, str]
) -> Manifest:
    config, parts, backbone = what.config, what.parts, what.parts.backbone
    return Manifest(
        format=FORMAT,
        pfm_llm=__version__,
        name=harmless(config.name),
        round=round_number,
        base=Base(
            name=harmless(backbone.portable_name),
            embedded=backbone.name if backbone.is_embedded else None,
            revision=config.backbone.revision,
            dtype=config.backbone.dtype,
            weights_sha256=backbone.weights_hash,
            tokenizer_sha256=backbone.tokenizer_hash,
        ),
        adapters=config.adapters,
        modules=tuple(parts.adapter.modules),
        head=_head_of(config),
        tasks=config.tasks,
        window=config.window,
        items=config.items.model_copy(update={"encoder": shown_name(config.items.encoder)}),
        item_encoder_sha256=parts.item_encoder_hash,
        ablation=config.ablation,
        prompt=parts.prompt.key,
        prompt_sha256=parts.prompt.content_hash(),
        data_source=shown_name(config.data.source),
        catalogue_sha256=what.catalogue.content_hash(),
        num_items=len(what.catalogue),
        contract_sha256=parts.contract.hash(),
        parents=what.parents,
        metrics=_metrics(rows),
        privacy=what.privacy and Privacy(**dataclasses.asdict(what.privacy)),
        files=hashes,
    )


def _metrics(rows: Sequence[ResultRow]) -> tuple[Metric, ...]:
    return tuple(
        Metric(
            mode=row.mode,
            metric=f"{row.metric}@{row.k}",
            value=row.value,
            ci_low=row.ci_low,
            ci_high=row.ci_high,
        )
        for row in rows
        if row.mode != Mode.NONE and row.split == "test" and row.candidates == FULL
    )


def _head_of(config: ExperimentConfig) -> HeadConfig:
    """The settings of the head, without those that had no effect."""
    if learns_met(config):
        return config.head
    return config.head.model_copy(update={"item_met": False, "item_dropout": 0.0})
