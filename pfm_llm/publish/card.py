"""The ``README.md`` of a published shared adapter, in the Hub's model card format.

The card is made from the data of the run, without network. It is public, so it shows only listed
settings and no local paths. At the time of the export the repository is unknown. The card therefore
names `NO_REPO`, which `addressed_card` replaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pfm_llm import __version__
from pfm_llm.base import templates
from pfm_llm.config.settings import leaves
from pfm_llm.evaluation.results import AUC, AUC_LABEL, FULL, RANK_LABELS, SAMPLED, ResultRow
from pfm_llm.protocol.types import Mode

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
    "no-differential-privacy",
)
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

_PLOT_TITLES = {
    "loss.png": "Training loss by round",
    "ndcg_by_round.png": "NDCG@10 on validation by round",
    "user_gain.png": "What a private adapter adds, user by user",
}


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    Attributes:
        name: Name of the run.
        base_model: Hub id of the backbone, or a local folder (then only its name is shown).
        prompt: Prompt key, such as ``next_item.v1``.
        dataset: Name or Hub id of the data, or a path (then only its name is shown).
        rounds: Number of trained rounds.
        scores: Result rows of any method, mode and split.
        results_table: The results as Markdown, as `result_tables.results_table` makes it; empty
            before the first evaluation.
        config: The resolved config, as nested mappings.
        plots: The plots in the folder, such as ``plots/loss.png``.
    """

    name: str
    base_model: str
    prompt: str
    dataset: str
    rounds: int
    scores: Sequence[ResultRow]
    results_table: str
    config: Mapping[str, Any]
    plots: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """The card: YAML front matter with a model index, then Markdown.

    The model index has the test scores of ``shared_only``: the folder holds the shared part alone.
    """
    body = templates.render(
        __package__,
        _TEMPLATE,
        is_html=False,
        facts=facts,
        base=shown_name(facts.base_model),
        dataset=shown_name(facts.dataset),
        adapter=NO_REPO,
        version=__version__,
        plots=[(_PLOT_TITLES.get(Path(p).name, Path(p).stem), p) for p in facts.plots],
        **_conditions(facts),
        **_from_config(facts.config),
    )
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{body}"


def addressed_card(card: str, repo: str) -> str:
    """A card whose examples load the adapter from a repository.

    Args:
        card: From `model_card`, made before it was known where the adapter would be.
        repo: ``user/name``.
    """
    return card.replace(NO_REPO, repo)


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    dataset, base = shown_name(facts.dataset), facts.base_model
    front: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if _is_hub_id(base) else {}),
        "library_name": "peft",
        "license": _LICENSE,
        "pipeline_tag": _PIPELINE_TAG,
        "tags": list(_TAGS),
        "datasets": [dataset],
    }
    confidence = leaves(facts.config).get("evaluation.confidence")
    metrics = [
        _index_entry(score, confidence)
        for score in facts.scores
        if (score.mode, score.split) == (Mode.SHARED_ONLY, "test")
    ]
    if metrics:  # the Hub refuses an index without results
        result = {
            "task": {"type": "recommendation", "name": "Next-item recommendation"},
            "dataset": {"type": dataset, "name": dataset, "split": "test"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": facts.name, "results": [result]}]
    return front


def _index_entry(score: ResultRow, confidence: Any) -> dict[str, Any]:
    sampled = score.candidates.removeprefix(SAMPLED)
    among = "full catalogue" if score.candidates == FULL else f"{sampled} sampled negatives"
    at_k = f"@{score.k}" if score.k else ""
    label = f"{_LABELS.get(score.metric, score.metric)}{at_k}, {among}"
    interval = {
        "ci_low": round(float(score.ci_low), 6),
        "ci_high": round(float(score.ci_high), 6),
        **({} if confidence is None else {"confidence": float(confidence)}),
    }
    return {
        "type": f"{score.metric}{at_k}",
        "value": round(float(score.value), 6),
        "name": label,
        "args": interval,
    }


def shown_name(name: str) -> str:
    """A Hub id or an embedded name unchanged, or the last part of a path."""
    return Path(name).name if _is_path(name) else name


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _is_hub_id(name: str) -> bool:
    return "/" in name and not _is_path(name)


def _conditions(facts: CardFacts) -> dict[str, bool]:
    """The conditional parts of the text that do not depend on settings."""
    dataset = shown_name(facts.dataset).lower()
    return {
        "is_on_hub": _is_hub_id(facts.base_model),
        "is_embedded_data": facts.dataset == _EMBEDDED_DATA,
        "is_movielens": "movielens" in dataset or dataset.startswith("ml-"),
        "has_paths": _is_path(facts.dataset) or _is_path(facts.base_model),
    }


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the text that come from the settings."""
    setting = leaves(config)
    ids, started = setting.get("head.item_ids") or "none", setting.get("init_from.adapter")
    shown = ((label, setting.get(key)) for key, label in _SETTINGS.items())
    return {
        "has_ids": ids != "none",
        "reads_ids": ids == "both",
        "has_bias": bool(setting.get("head.item_bias")),
        "has_context": bool(setting.get("head.item_context")),
        "window_items": setting.get("window.items"),
        "is_embedded_base": setting.get("backbone.name") == _EMBEDDED_BASE,
        "started_from": started and shown_name(str(started)),
        "settings": [
            (label, ", ".join(value) if isinstance(value, list | tuple) else value)
            for label, value in shown
            if value is not None
        ],
    }
