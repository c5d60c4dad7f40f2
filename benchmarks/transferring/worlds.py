"""Two worlds without a common user or item: one to train an adapter in, one to serve it in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pfm_llm.base.seeding import numpy_generator
from pfm_llm.data.interactions import Interactions


@dataclass(frozen=True)
class World:
    """A data set as files.

    Attributes:
        data: The section ``data`` of a config.
        items: The file of item texts: all that whoever serves a published adapter has to have.
    """

    data: dict[str, Any]
    items: Path


def halves(interactions: Interactions, folder: Path, seed: int) -> tuple[World, World]:
    """Two worlds of one data set: a random half of its users with a random half of its items each.

    A user has the events on the items of the own world, in their order; the others are left out.

    Args:
        interactions: The data set.
        folder: The files are written here.
        seed: Draws the halves.
    """
    generator = numpy_generator(seed, "transfer/halves")
    users = generator.permutation(interactions.num_users)
    items = generator.permutation(len(interactions.catalogue))
    both = zip(np.array_split(users, 2), np.array_split(items, 2), strict=True)
    names = ("source", "target")
    source, target = (
        _written(interactions, np.sort(own), np.sort(theirs), folder / name)
        for name, (own, theirs) in zip(names, both, strict=True)
    )
    return source, target


def _written(
    interactions: Interactions, users: np.ndarray, items: np.ndarray, folder: Path
) -> World:
    """The events of some users on some items, and the texts of these items, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, ours = interactions.catalogue.item_ids, set(items.tolist())
    events = [
        (interactions.user_ids[user], ids[item], place)
        for user in users.tolist()
        for place, item in enumerate(interactions.history(user).tolist())
        if item in ours
    ]
    catalogue = interactions.catalogue.take(items)
    texts = pd.DataFrame({"item_id": catalogue.item_ids, **catalogue.fields})
    texts.to_csv(folder / "items.csv", index=False)
    frame = pd.DataFrame(events, columns=["user_id", "item_id", "position"])
    frame.to_csv(folder / "interactions.csv", index=False)
    data = {
        "source": str(folder / "interactions.csv"),
        "items": str(folder / "items.csv"),
        "columns": {"timestamp": "position"},
    }
    return World(data, folder / "items.csv")
