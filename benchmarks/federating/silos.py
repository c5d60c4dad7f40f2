"""MovieLens-100K in silos: each node has the file of its own users, all have the file of items."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pfm_llm.config.data import DataConfig
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.sources import load_interactions

_COLUMNS = ("user_id", "item_id", "timestamp", "rating")


@dataclass(frozen=True)
class Silos:
    """Files of a federation's data.

    Attributes:
        folder: It must not be published: the data may not be redistributed.
        nodes: Names of the nodes.
    """

    folder: Path
    nodes: tuple[str, ...]

    @property
    def items(self) -> Path:
        """The items with their texts, which every node and the server have."""
        return self.folder / "items.csv"

    @property
    def everybody(self) -> Path:
        """The interactions of all nodes, to compare with one process that has all."""
        return self.folder / "everybody.csv"

    def of(self, node: str) -> Path:
        """The interactions of a node's users."""
        return self.folder / f"{node}.csv"

    def private(self, node: str) -> Path:
        """A node's private folder."""
        return self.folder / f"{node}.private"

    def write_site(self, node: str, **settings: Any) -> Path:
        """Write a node's ``site.yaml``.

        Args:
            node: Its name.
            settings: Sections of a `SiteConfig` beside data and folder.
        """
        tree = {
            "data": {"source": str(self.of(node)), "items": str(self.items)},
            "folder": str(self.private(node)),
            "socket": {"path": str(self.folder / f"{node}.socket" / "s")},
            **settings,
        }
        path = self.folder / f"{node}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


def write_silos(folder: Path, nodes: Sequence[str]) -> Silos:
    """Divide the users of MovieLens-100K over nodes, in turn.

    Raises:
        AssetError: The data cannot be fetched.
    """
    silos = Silos(folder, tuple(nodes))
    data = load_interactions(DataConfig(source="movielens-100k"), seed=0)[0]
    fields = data.catalogue.fields
    texts: Mapping[str, Sequence[str]] = {"item_id": data.catalogue.item_ids, **fields}
    _write(silos.items, list(texts), zip(*texts.values(), strict=True))
    rows = [_rows(data, user) for user in range(data.num_users)]
    _write(silos.everybody, _COLUMNS, (row for own in rows for row in own))
    for number, node in enumerate(nodes):
        own = rows[number :: len(nodes)]
        _write(silos.of(node), _COLUMNS, (row for user in own for row in user))
    return silos


def _rows(data: Interactions, user: int) -> list[tuple[Any, ...]]:
    own = range(data.offsets[user], data.offsets[user + 1])
    assert data.timestamps is not None
    assert data.ratings is not None
    return [
        (
            data.user_ids[user],
            data.catalogue.item_ids[data.items[i]],
            data.timestamps[i],
            data.ratings[i],
        )
        for i in own
    ]


def _write(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
