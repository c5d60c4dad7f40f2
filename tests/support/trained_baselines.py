"""What the tests of SASRec and PFedRec share: made-up worlds, as a config and its split."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfm_llm.config.schema import ExperimentConfig
from pfm_llm.data.splits import Split
from pfm_llm.runs.run import load_corpus
from tests.support.tiny import Tiny, write_interactions

NUM_ITEMS = 30


class Forbidden:
    """Stands where a test split would: to look at anything of it fails."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test split was read: {name}")


def circles(num_users: int = 20, length: int = 9) -> dict[str, list[int]]:
    """Users who go round the catalogue one item after the other, each from its own start."""
    return {
        f"u{user}": [(7 * user + step) % NUM_ITEMS for step in range(length)]
        for user in range(num_users)
    }


def world(
    tiny: Tiny, folder: Path, histories: Mapping[str, list[int]], **settings: Any
) -> tuple[ExperimentConfig, Split]:
    """A config with these histories as data, and its split."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_interactions(folder / "interactions.csv", histories)
    config = tiny.config(folder, data__source=str(source), **settings)
    return config, load_corpus(config).split


def without_test(split: Split) -> Split:
    """The split, with a test part that cannot be read."""
    forbidden: Any = Forbidden()
    return dataclasses.replace(split, test=forbidden)
