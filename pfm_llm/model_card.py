"""The ``README.md`` of a published shared adapter, in the Hub's model card format.

Built from what the run already knows, without network. Only listed settings are shown, and
local paths are not: a card is read by everybody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pfm_llm.types import Mode

_LICENSE = "apache-2.0"
# The adapter serves hidden states; its text is not meant to be read.
_PIPELINE_TAG = "feature-extraction"
_TAGS = ("peft", "lora", "federated-learning", "recommender-system", "sequential-recommendation")
_METRICS = {"ndcg": "NDCG", "hit_rate": "Hit rate", "mrr": "MRR"}
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
    "data.split": "Split",
    "seed": "Seed",
}

_BODY = """
# {name}

A LoRA adapter that turns {base_link} into a sequential recommender:
the model reads a user's history as text, and its hidden state at the last token of an item ranks
the catalogue for what comes next. It is the **shared adapter** of a federation, trained by
pfm_llm in {rounds} rounds: in each, some clients train it on histories that they keep, and the
server aggregates their updates.

## How to load it

The folder is a plain PEFT adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r})
```

{base_note}This gives hidden states. To rank a catalogue they go through
`recommender_head.safetensors`, beside the adapter, with histories rendered by the prompt
`{prompt}`: `pfm_llm` does both.

## Results

{table}
This folder alone gives the `shared_only` row. `shared_private` is what a user gets who adds a
private adapter of their own, trained on their own device.

## Privacy

- **No differential privacy**: no noise was added in training and there is no formal bound on what
  this adapter reveals about the histories that it was trained on.
- Private adapters and histories are never in this folder.
- During training, whoever sees a *single* client's update can read much of that client's history
  off it. The aggregate published here mixes the updates of many clients.

## Training

{settings}
"""


class Score(Protocol):
    """The part of a result row that goes into the card's metadata."""

    @property
    def method(self) -> str:
        """``pfm`` for our model."""

    @property
    def mode(self) -> str:
        """A value of `types.Mode`."""

    @property
    def split(self) -> str:
        """``validation`` or ``test``."""

    @property
    def candidates(self) -> str:
        """``full`` or ``sampled<n>``."""

    @property
    def metric(self) -> str:
        """``ndcg``, ``hit_rate`` or ``mrr``."""

    @property
    def k(self) -> int:
        """Cut-off."""

    @property
    def value(self) -> float:
        """Mean over users."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: Name of the run.
        base_model: Hub id of the backbone, or a local folder (then only its name is shown).
        prompt: Prompt key, such as ``next_item.v1``.
        dataset: Name or Hub id of the data, or a path (then only its name is shown).
        rounds: Rounds that were trained.
        scores: Result rows of any method, mode and split; `run_report.ResultRow` fits.
        results_table: The results as Markdown, as `run_report.results_table` makes it.
        config: The resolved config, as nested mappings.
        adapter: Hub id or folder name of the adapter, for the loading example.
        base_note: A sentence on how the base weights were had, when that matters; may be empty.
    """

    name: str
    base_model: str
    prompt: str
    dataset: str
    rounds: int
    scores: Sequence[Score]
    results_table: str
    config: Mapping[str, Any]
    adapter: str = "path/to/this/folder"
    base_note: str = ""


def model_card(facts: CardFacts) -> str:
    """The card: YAML front matter with a model index, then Markdown.

    The model index holds the test scores of ``shared_only``, which are what this folder gives.
    """
    base = _shown(facts.base_model)
    body = _BODY.format(
        name=facts.name,
        base=base,
        base_link=f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{base}`",
        rounds=facts.rounds,
        adapter=facts.adapter,
        base_note=f"{facts.base_note.strip()}\n\n" if facts.base_note.strip() else "",
        prompt=facts.prompt,
        table=facts.results_table,
        settings=_settings_table(facts.config),
    )
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{body}"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    dataset = _shown(facts.dataset)
    front: dict[str, Any] = {
        **({"base_model": facts.base_model} if _is_hub_id(facts.base_model) else {}),
        "library_name": "peft",
        "license": _LICENSE,
        "pipeline_tag": _PIPELINE_TAG,
        "tags": list(_TAGS),
        "datasets": [dataset],
    }
    metrics = [_index_entry(score) for score in facts.scores if _is_of_this_folder(score)]
    if metrics:  # an index without results is refused by the Hub
        result = {
            "task": {"type": "recommendation", "name": "Next-item recommendation"},
            "dataset": {"type": dataset, "name": dataset, "split": "test"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": facts.name, "results": [result]}]
    return front


def _is_of_this_folder(score: Score) -> bool:
    return (score.method, score.mode, score.split) == ("pfm", Mode.SHARED_ONLY, "test")


def _index_entry(score: Score) -> dict[str, Any]:
    sampled = score.candidates.removeprefix("sampled")
    among = "full catalogue" if score.candidates == "full" else f"{sampled} sampled negatives"
    label = f"{_METRICS.get(score.metric, score.metric)}@{score.k}, {among}"
    return {
        "type": f"{score.metric}@{score.k}",
        "value": round(float(score.value), 6),
        "name": label,
    }


def _shown(name: str) -> str:
    """A Hub id or an embedded name as it is; of a path the last part alone."""
    return Path(name).name if _is_path(name) else name


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _is_hub_id(name: str) -> bool:
    return "/" in name and not _is_path(name)


def _settings_table(config: Mapping[str, Any]) -> str:
    lines = ["| Setting | Value |", "| --- | --- |"]
    for key, label in _SETTINGS.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            text = ", ".join(value) if isinstance(value, (list, tuple)) else value
            lines.append(f"| {label} | {text} |")
    return "\n".join(lines)
