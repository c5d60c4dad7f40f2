"""The ``README.md`` of a published shared adapter, in the Hub's model card format.

Built from what the run already knows, without network. Only listed settings are shown, and
local paths are not: a card is read by everybody. Where the adapter will be is not known when it
is exported, so a card names `NO_REPO` until `addressed_card` puts the repository in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pfm_llm import __version__
from pfm_llm.protocol.types import Mode

NO_REPO = "path/to/this/folder"
"""Stands in a card for the repository's name."""

_LICENSE = "apache-2.0"
_EMBEDDED_BASE, _EMBEDDED_DATA = "smollm2-135m", "movielens-100k"
# The adapter serves hidden states; its text is not meant to be read.
_PIPELINE_TAG = "feature-extraction"
_TAGS = (
    "peft",
    "lora",
    "federated-learning",
    "recommender-system",
    "sequential-recommendation",
    "no-differential-privacy",
)
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
    "head.item_context": "Items act on the user vector directly",
    "data.split": "Split",
    "seed": "Seed",
}

_PLOTS = {
    "loss.png": "Training loss by round",
    "ndcg_by_round.png": "NDCG@10 on validation by round",
    "user_gain.png": "What a private adapter adds, user by user",
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
`{prompt}`: `pfm_llm` does both, on this catalogue or on another:

```python
from pfm_llm.recommender import RecommenderModel

model = RecommenderModel.from_pretrained({arguments})
best = model.recommend(history)  # item ids, oldest first
```

{rebuild}## From hidden states to scores

{head}
## Results

{results}
## Privacy

- **No differential privacy**: no noise was added in training and there is no formal bound on what
  this adapter reveals about the histories that it was trained on.
- Private adapters and histories are never in this folder. Before it is published, all of it is
  searched for the numbers of the run's private adapters.
- During training, whoever sees a *single* client's update can read much of that client's history
  off it. The aggregate published here mixes the updates of many clients.

## Training

{settings}

`training_config.yaml`, in this folder, is the whole config. This repeats the training, in a
checkout of pfm_llm {version}:

```console
{command}
```

{data}
"""

_COMMAND = (
    "accelerate launch -q --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no scripts/fed_train.py --config training_config.yaml"
)

_REBUILD = """## The base weights

They are those of SmolLM2-135M-Instruct's Q4_1 GGUF file, dequantised to float32; the weights on
the Hub differ a little. pfm_llm takes them by itself. For plain PEFT, this builds them and gives
the folder to load `base` from; `pfm_manifest.json` holds the weights' hash:

```console
python -c "from pfm_llm.base.assets import smollm2_135m; print(smollm2_135m())"
```

"""

_HEAD = """All names are tensors of `recommender_head.safetensors`, and D is the number of rows of
`head.state_proj`:

```
{lines}
```

`x` is the model's state after its final norm, at the last token of a history. `t_i` is that of the
base model, without adapter, at the last token of item i's `catalogue_item` text alone. A history
is the prompt's `header` and the `item` text of {items} items, oldest first, each
tokenised by itself without special tokens. Item i is the one whose key is `item_keys.json[i]`: the
first 32 hexadecimal digits of the SHA-256 of `json.dumps([item_id, catalogue_item_text])`.{read_in}
"""
_READ_IN = """ While a
history is read, `head.item_ids_in e_i` is added to the hidden state at each item's last token,
where the lowest adapted layer begins."""
_CONTEXT = """

`c` joins two weighted means over the items of the history, of `z_i` and, where there is one, `e_i`:
an item that a items came after weighs `2 ** (-a / exp(head.context_log_h[k]))` in the k-th."""

_RESULTS_NOTE = """
This folder alone gives the `shared_only` row. `shared_private` is what a user gets who adds a
private adapter of their own, trained on their own device. Brackets hold bootstrap intervals over
users; the metadata of this card has them as `ci_low` and `ci_high` of each figure.
"""

_MOVIELENS = """The data are MovieLens data, © GroupLens Research: for research, not to be
redistributed, and not for commercial use without GroupLens's permission. A publication that uses
them cites F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS
5(4), 2015. This folder holds none of them: `item_keys.json` holds hashes."""
_DATA = """The data, {dataset}, are not in this folder: `item_keys.json` holds hashes of items."""


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

    @property
    def ci_low(self) -> float:
        """Lower end of the bootstrap interval over users."""

    @property
    def ci_high(self) -> float:
        """Upper end of it."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: Name of the run.
        base_model: Hub id of the backbone, or a local folder (then only its name is shown).
        prompt: Prompt key, such as ``next_item.v1``.
        dataset: Name or Hub id of the data, or a path (then only its name is shown).
        rounds: Rounds that were trained.
        scores: Result rows of any method, mode and split; `results.ResultRow` fits.
        results_table: The results as Markdown, as `result_tables.results_table` makes it; empty
            before the first evaluation.
        config: The resolved config, as nested mappings.
        adapter: Hub id or folder name of the adapter, for the loading example.
        base_note: A sentence on how the base weights were had, when that matters; may be empty.
        plots: The plots in the folder, such as ``plots/loss.png``.
    """

    name: str
    base_model: str
    prompt: str
    dataset: str
    rounds: int
    scores: Sequence[Score]
    results_table: str
    config: Mapping[str, Any]
    adapter: str = NO_REPO
    base_note: str = ""
    plots: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """The card: YAML front matter with a model index, then Markdown.

    The model index holds the test scores of ``shared_only``, which are what this folder gives.
    """
    base = shown_name(facts.base_model)
    body = _BODY.format(
        name=facts.name,
        base=base,
        base_link=f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{base}`",
        rounds=facts.rounds,
        adapter=facts.adapter,
        arguments=_arguments(facts),
        base_note=f"{facts.base_note.strip()}\n\n" if facts.base_note.strip() else "",
        prompt=facts.prompt,
        rebuild=_REBUILD if _setting(facts.config, "backbone.name") == _EMBEDDED_BASE else "",
        head=_head_formulas(facts.config),
        results=_results(facts),
        settings=_settings_table(facts.config),
        version=__version__,
        command=_COMMAND,
        data=_data_note(facts),
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
    confidence = _setting(facts.config, "evaluation.confidence")
    metrics = [
        _index_entry(score, confidence) for score in facts.scores if _is_of_this_folder(score)
    ]
    if metrics:  # an index without results is refused by the Hub
        result = {
            "task": {"type": "recommendation", "name": "Next-item recommendation"},
            "dataset": {"type": dataset, "name": dataset, "split": "test"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": facts.name, "results": [result]}]
    return front


def _is_of_this_folder(score: Score) -> bool:
    return (score.mode, score.split) == (Mode.SHARED_ONLY, "test")


def _index_entry(score: Score, confidence: float | None) -> dict[str, Any]:
    sampled = score.candidates.removeprefix("sampled")
    among = "full catalogue" if score.candidates == "full" else f"{sampled} sampled negatives"
    label = f"{_METRICS.get(score.metric, score.metric)}@{score.k}, {among}"
    interval = {
        "ci_low": round(float(score.ci_low), 6),
        "ci_high": round(float(score.ci_high), 6),
        **({} if confidence is None else {"confidence": float(confidence)}),
    }
    return {
        "type": f"{score.metric}@{score.k}",
        "value": round(float(score.value), 6),
        "name": label,
        "args": interval,
    }


def shown_name(name: str) -> str:
    """A Hub id or an embedded name as it is; of a path the last part alone."""
    return Path(name).name if _is_path(name) else name


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _is_hub_id(name: str) -> bool:
    return "/" in name and not _is_path(name)


def _head_formulas(config: Mapping[str, Any]) -> str:
    """How the head's tensors make scores, for somebody who does without pfm_llm."""
    ids = _setting(config, "head.item_ids") or "none"
    has_ids, has_bias = ids != "none", _setting(config, "head.item_bias")
    terms = "u · (head.item_proj z_i)" + (" + u · (head.item_ids_out e_i)" if has_ids else "")
    context = " + head.context_proj c" if _setting(config, "head.item_context") else ""
    lines = [
        f"u     = head.state_proj ((x - normaliser.mean) @ normaliser.basis){context}",
        "z_i   = ((t_i - normaliser.mean) @ normaliser.basis)[:D]",
        *(["e_i   = head.item_ids[i]"] if has_ids else []),
        f"score = 0.5 / sqrt(D) * ({terms})" + (" + head.item_bias[i]" if has_bias else ""),
    ]
    items = _setting(config, "window.items")
    return _HEAD.format(
        lines="\n".join(lines),
        items=f"the newest {items}" if items else "a window of",
        read_in=(_READ_IN if ids == "both" else "") + (_CONTEXT if context else ""),
    )


def _arguments(facts: CardFacts) -> str:
    """What `RecommenderModel.from_pretrained` has to be told."""
    needed = [repr(facts.adapter)]
    if facts.dataset != _EMBEDDED_DATA:
        needed.append('catalogue="items.csv"')
    if not _is_hub_id(facts.base_model):
        needed.append('backbone="path/to/the/base/model"')
    return ", ".join(needed)


def _results(facts: CardFacts) -> str:
    shown = [f"![{_PLOTS.get(Path(plot).name, Path(plot).stem)}]({plot})\n" for plot in facts.plots]
    if not facts.results_table.strip():
        return "\n".join(["It has not been evaluated yet.\n", *shown])
    return "\n".join([f"{facts.results_table}{_RESULTS_NOTE}", *shown])


def _data_note(facts: CardFacts) -> str:
    dataset = shown_name(facts.dataset)
    is_movielens = "movielens" in dataset.lower() or dataset.lower().startswith("ml-")
    notes = [_MOVIELENS if is_movielens else _DATA.format(dataset=dataset)]
    if _is_path(facts.dataset) or _is_path(facts.base_model):
        notes.append("Paths in the config are reduced to names: put your own in their place.")
    started = _setting(facts.config, "init_from.adapter")
    if started is not None:
        notes.append(f"The training went on from another adapter, `{shown_name(str(started))}`.")
    return "\n\n".join(notes)


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting by its dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _settings_table(config: Mapping[str, Any]) -> str:
    lines = ["| Setting | Value |", "| --- | --- |"]
    for key, label in _SETTINGS.items():
        value = _setting(config, key)
        if value is not None:
            text = ", ".join(value) if isinstance(value, (list, tuple)) else value
            lines.append(f"| {label} | {text} |")
    return "\n".join(lines)
