"""The ``README.md`` of a published shared adapter, in the Hub's model card format.

The card is made from the data of the run, without network. It is public, so it shows only listed
settings and no local paths. At the time of the export the repository is unknown. The card therefore
names `NO_REPO`, which `addressed_card` replaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from pfm_llm import __version__
from pfm_llm.base import templates
from pfm_llm.base.terminal import harmless
from pfm_llm.config.choices import Pooling, Reading
from pfm_llm.config.cut_offs import RANK_LABELS
from pfm_llm.config.model import ItemsConfig
from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.evaluation.results import AUC, AUC_LABEL, FULL, SAMPLED, ResultRow
from pfm_llm.evaluation.tables import results_table
from pfm_llm.model.items.codes import TEXT_DIM
from pfm_llm.protocol.types import Mode
from pfm_llm.server.privacy.mechanism import Spent

NO_REPO = "path/to/this/folder"
"""Stands in a card for the repository's name."""

_TEMPLATE = "card.md.j2"
_LICENSE = "apache-2.0"
_EMBEDDED_BASE, _EMBEDDED_DATA = "smollm2-135m", "movielens-100k"
# The adapter is for hidden states, not for generated text.
_PIPELINE_TAG = "feature-extraction"
_TAGS = (
    "peft",
    "lora",
    "federated-learning",
    "recommender-system",
    "sequential-recommendation",
)
_PRIVATE_TAG, _NOT_PRIVATE_TAG = "differential-privacy", "no-differential-privacy"
_LABELS = {**RANK_LABELS, AUC: AUC_LABEL}
_SETTINGS = {
    "federation.num_rounds": "Rounds planned",
    "federation.cohort_size": "Clients per round",
    "data.users_per_client": "Users per client",
    "federation.local.schedule": "Schedule",
    "federation.local.shared_local_steps": "Local steps on the shared adapter",
    "federation.local.private_local_steps": "Local steps on the private adapter",
    "federation.server.optimizer": "Server optimizer",
    "federation.server.weighting": "Weighting of clients",
    "federation.server.lr_lora": "Server learning rate, LoRA",
    "federation.server.lr_head": "Server learning rate, head",
    "federation.server.lr_schedule": "Learning-rate schedule",
    "adapters.num_layers": "Adapted layers, from the top",
    "adapters.targets": "Adapted modules",
    "adapters.shared.rank": "LoRA rank",
    "adapters.shared.alpha": "LoRA alpha",
    "window.items": "Items per window",
    "head.item_ids": "Learned item embeddings",
    "head.item_context": "Items act on the user vector directly",
    "data.split": "Split",
    "seed": "Seed",
}

_ONE_SPACE = ("next_item.v1", "next_item_genres.v1", "next_item_ratings.v1")
"""Prompts by which an item by itself has the text that a history shows."""

_PLOT_TITLES = {
    "loss.png": "Training loss by round",
    "ndcg_by_round.png": "NDCG@10 on validation by round",
    "user_gain.png": "What a private adapter adds, user by user",
}


@dataclass(frozen=True)
class Shown:
    """What a card tells of the training and its results.

    Attributes:
        rows: Result rows of any method, mode and split; empty before the first evaluation.
        plots: The plots in the folder, such as ``plots/loss.png``.
        privacy: What the training has spent; None: there was no noise.
    """

    rows: Sequence[ResultRow] = ()
    plots: Sequence[str] = ()
    privacy: Spent | None = None


def model_card(
    config: ExperimentConfig,
    base_model: str,
    prompt: str,
    rounds: int,
    shown: Shown = Shown(),
) -> str:
    """The card: YAML front matter with a model index, then Markdown.

    The model index has the test scores of ``shared_only``: the folder holds the shared part alone.

    Args:
        config: The experiment. Of a path in it, only the last part is shown.
        base_model: Hub id of the backbone, or a local folder (then only its name is shown).
        prompt: Prompt key, such as ``next_item.v1``.
        rounds: Number of trained rounds.
        shown: Results, plots and privacy.
    """
    rows, plots = shown.rows, shown.plots
    source, dataset = config.data.source, shown_name(config.data.source)
    settings = [(label, attrgetter(key)(config)) for key, label in _SETTINGS.items()]
    body = templates.render(
        __package__,
        _TEMPLATE,
        is_html=False,
        config=config,
        base=shown_name(base_model),
        prompt=prompt,
        dataset=dataset,
        rounds=rounds,
        results=results_table(rows, confidence=config.evaluation.confidence) if rows else "",
        is_one_space=_is_one_space(config, prompt),
        reads_items=config.window.reading is Reading.ITEMS,
        item_vector=_item_vector(config.items),
        codes=config.head.codes,
        text_width=min(TEXT_DIM, config.head.dim),
        adapter=NO_REPO,
        version=__version__,
        plots=[(_PLOT_TITLES.get(Path(p).name, Path(p).stem), p) for p in plots],
        settings=[(label, value) for label, value in settings if value is not None],
        privacy=shown.privacy,
        started_from=config.init_from and shown_name(config.init_from.adapter),
        is_on_hub=_is_hub_id(base_model),
        is_embedded_base=config.backbone.name == _EMBEDDED_BASE,
        is_embedded_data=source == _EMBEDDED_DATA,
        is_movielens="movielens" in dataset.lower() or dataset.lower().startswith("ml-"),
        has_paths=_is_path(source) or _is_path(base_model),
    )
    matter = _front_matter(config, base_model, shown)
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{body}"


def _is_one_space(config: ExperimentConfig, prompt: str) -> bool:
    """Whether item vectors are states of the text that a history shows."""
    items, reads_items = config.items, config.window.reading is Reading.ITEMS
    is_alike = items.pooling is Pooling.LAST and items.max_tokens is None
    return items.is_backbone and is_alike and (reads_items or prompt in _ONE_SPACE)


def _item_vector(items: ItemsConfig) -> str:
    """What the vector of an item is made of, up to its text."""
    if not items.is_backbone:
        return f"the vector that the encoder\n`{shown_name(items.encoder)}` makes of"
    where = "at the last token" if items.pooling is Pooling.LAST else "in the mean over the tokens"
    return f"that of the\nbase model, without adapter, {where} of"


def addressed_card(card: str, repo: str) -> str:
    """A card whose examples load the adapter from a repository.

    Args:
        card: From `model_card`, made before it was known where the adapter would be.
        repo: ``user/name``.
    """
    return card.replace(NO_REPO, repo)


def _front_matter(config: ExperimentConfig, base: str, shown: Shown) -> dict[str, Any]:
    dataset = shown_name(config.data.source)
    front: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if _is_hub_id(base) else {}),
        "library_name": "peft",
        "license": _LICENSE,
        "pipeline_tag": _PIPELINE_TAG,
        "tags": [*_TAGS, _PRIVATE_TAG if shown.privacy else _NOT_PRIVATE_TAG],
        "datasets": [dataset],
    }
    metrics = [
        _index_entry(row, config.evaluation.confidence)
        for row in shown.rows
        if (row.mode, row.split) == (Mode.SHARED_ONLY, "test")
    ]
    if metrics:  # the Hub refuses an index without results
        result = {
            "task": {"type": "recommendation", "name": "Next-item recommendation"},
            "dataset": {"type": dataset, "name": dataset, "split": "test"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": config.name, "results": [result]}]
    return front


def _index_entry(score: ResultRow, confidence: float) -> dict[str, Any]:
    sampled = score.candidates.removeprefix(SAMPLED)
    among = "full catalogue" if score.candidates == FULL else f"{sampled} sampled negatives"
    at_k = f"@{score.k}" if score.k else ""
    label = f"{_LABELS.get(score.metric, score.metric)}{at_k}, {among}"
    interval = {
        "ci_low": round(float(score.ci_low), 6),
        "ci_high": round(float(score.ci_high), 6),
        "confidence": confidence,
    }
    return {
        "type": f"{score.metric}{at_k}",
        "value": round(float(score.value), 6),
        "name": label,
        "args": interval,
    }


def shown_name(name: str) -> str:
    """A Hub id or an embedded name, or the last part of a path; on one line."""
    return harmless(Path(name).name if _is_path(name) else name)


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _is_hub_id(name: str) -> bool:
    return "/" in name and not _is_path(name)
