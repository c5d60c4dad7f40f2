"""A tiny language model and tiny data, so that a whole run takes a second or two."""

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pfm_llm.config.schema import ExperimentConfig, parse_config

TITLES = tuple(
    f"{adjective} {noun}"
    for adjective in ("red", "blue", "green", "old", "new", "big")
    for noun in ("fish", "boat", "house", "tree", "song")
)
NUM_USERS = 24
NUM_LAYERS = 3


@dataclass(frozen=True)
class Tiny:
    """The files of the tiny world.

    Attributes:
        model: A saved random Llama (3 layers, 32 wide, context 512) with its tokenizer.
        interactions: A CSV of 24 users' histories of 5 to 20 events.
        items: A CSV of 30 items with titles.
        reading: Value of ``window.reading``; with ``tokens`` the clients cache trunk states.
    """

    model: Path
    interactions: Path
    items: Path
    reading: str = "items"

    @property
    def by_tokens(self) -> "Tiny":
        """The same, with layers that read all tokens of a history."""
        return replace(self, reading="tokens")

    def tree(self, output: Path, **settings: Any) -> dict[str, Any]:
        """A config tree; ``settings`` are dotted keys with ``__`` for each dot."""
        tree: dict[str, Any] = {
            "name": "tiny",
            "method": "custom",
            "data": {"source": str(self.interactions), "items": str(self.items)},
            "backbone": {"name": str(self.model), "dtype": "float32"},
            "items": {"encoder": "backbone"},
            "window": {"items": 4, "reading": self.reading},
            "adapters": {
                "num_layers": 2,
                "shared": {"rank": 2, "alpha": 4},
                "private": {"rank": 2, "alpha": 4, "head_rank": 2},
            },
            "head": {"dim": 8, "id_dim": 4, "dropout": 0.0, "item_dropout": 0.0},
            "federation": {
                "num_rounds": 4,
                "cohort_size": 4,
                "local": {
                    "personalise_steps": 2,
                    "personalise_windows": None,
                    "private_lr": 5e-4,
                },
                "server": {"lr_item_ids": 3e-3, "lr_scale": 1.0, "warmup_rounds": 0},
            },
            "evaluation": {"every": 0, "bootstrap": 20, "num_negatives": 5, "ks": [5, 10]},
            "runtime": {"threads": 1},
            "output": {"dir": str(output), "checkpoint_every": 2},
        }
        if settings.get("method", "custom") == "custom":  # a method fixes them itself
            tree["adapters"]["private"]["kind"] = "independent"
            tree["federation"]["local"]["schedule"] = "alternate"
        for key, value in settings.items():
            *parents, last = key.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return tree

    def config(self, output: Path, **settings: Any) -> ExperimentConfig:
        """`tree`, validated."""
        return parse_config(self.tree(output, **settings))

    def config_file(self, path: Path, output: Path, **settings: Any) -> Path:
        """`tree`, written as YAML to ``path``."""
        path.write_text(yaml.safe_dump(self.tree(output, **settings)))
        return path


def make_tiny(folder: Path) -> Tiny:
    """Write the tiny world's files to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_items(folder / "items.csv", TITLES)
    write_interactions(folder / "interactions.csv", random_histories())
    return Tiny(folder / "model", folder / "interactions.csv", folder / "items.csv")


def write_model(folder: Path) -> None:
    """Save a random Llama and a small byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(TITLES) * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
            )
        )
    model.save_pretrained(folder)


def write_encoder(folder: Path, pooling: str | None = None, width: int = 24) -> None:
    """Save a random BERT and a tokenizer of whole words: a text encoder.

    Args:
        folder: Where to.
        pooling: The key of sentence-transformers that is true; None: no such file.
        width: Numbers of a vector.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for title in TITLES for word in title.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
        )
    model.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))


def random_histories(num_users: int = NUM_USERS, seed: int = 0) -> dict[str, list[int]]:
    """Walks over the catalogue in steps of 1, 2 or 7, of 5 to 20 events, repeats included."""
    draw = random.Random(seed)
    histories = {}
    for user in range(num_users):
        start = draw.randrange(len(TITLES))
        steps = [draw.choice((1, 2, 7)) for _ in range(draw.randint(5, 20))]
        walk = itertools.accumulate(steps, initial=start)
        histories[f"u{user}"] = [item % len(TITLES) for item in walk][1:]
    return histories


def write_items(path: Path, titles: tuple[str, ...] | list[str]) -> Path:
    """Write a CSV of items ``i0``, ``i1``, … with these titles."""
    rows = [f"i{number},{title}" for number, title in enumerate(titles)]
    path.write_text("\n".join(["item_id,title", *rows, ""]))
    return path


def write_interactions(
    path: Path, histories: Mapping[str, list[int]], ratings: bool = False
) -> Path:
    """Write histories of item numbers as a CSV, users interleaved, in order of time."""
    rows = sorted(
        (time, user, item) for user, items in histories.items() for time, item in enumerate(items)
    )
    lines = ["user_id,item_id,timestamp" + (",rating" if ratings else "")]
    lines += [
        f"{user},i{item},{time}" + (f",{1 + item % 5}" if ratings else "")
        for time, user, item in rows
    ]
    path.write_text("\n".join([*lines, ""]))
    return path


def results_of(run: Path) -> dict[str, Any]:
    """A run's ``results.json``."""
    content: dict[str, Any] = json.loads((run / "results.json").read_text())
    return content


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """A run's ``metrics.jsonl``, without what a clock says and the checksums over it."""
    clock = {"seconds", "clients_per_second", "trunk_seconds", "crc32"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def tensor_files(run: Path) -> dict[str, bytes]:
    """Every tensor file of a run and of its private folder but the caches, by relative path."""
    private = run.with_name(f"{run.name}.private")
    return {
        str(path.relative_to(run.parent)).replace(run.name, "run", 1): path.read_bytes()
        for folder in (run, private)
        for path in sorted(folder.rglob("*.safetensors"))
        if path.parent.name != "trunk"
    }


def leftovers(*folders: Path) -> list[Path]:
    """Temporary files below some folders: whatever a write was cut off in."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.name.startswith(".") or path.suffix == ".tmp"
    ]


def alone() -> Any:
    """`Processes` of this process by itself, for tests that wire an experiment."""
    from accelerate import Accelerator

    from pfm_llm.base.processes import Processes

    return Processes(Accelerator(cpu=True), threads=1)
