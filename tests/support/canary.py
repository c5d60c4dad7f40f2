"""Canaries of a node: strings and tensors that must not leave it, and a search for them.

A string is looked for as it is, in hexadecimal and in base64 at any alignment.
"""

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pfm_llm.client.private_store import PrivateStore
from tests.support.leaks import Hunt
from tests.support.nodes import histories_of
from tests.support.tiny import TITLES, Tiny, write_interactions, write_items

USER = "canary-5b1d9e"
"""Part of the id of each user."""
TITLE = "Canary Title 7f3a"
"""The title of one item, in place of the first of `TITLES`."""


class Canaries:
    """What must not leave the nodes.

    Attributes:
        texts: The forms in which a string is looked for, each with what it stands for.
        tensors: The private tensors.
    """

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}
        self.tensors = Hunt()

    def learn_text(self, text: str, label: str) -> None:
        """Look for a string of at least eight letters."""
        raw = text.encode()
        self.texts[raw] = label
        self.texts[raw.hex().encode()] = f"{label} hex"
        for before in range(3):
            # The first and the last letters depend on what stands beside the string.
            encoded = base64.b64encode(bytes(before) + raw)
            self.texts[encoded[4 if before else 0 : -4]] = f"{label} base64"

    def learn_store(self, node: str, store: PrivateStore) -> int:
        """Look for the newest private tensors of all clients of a node; how many there are."""
        states = [store.load(client) for client in store.client_ids()]
        for state in states:
            if state is not None:
                self.tensors.learn(f"{node}/{state.client_id}", state.tensors)
        return len(states)

    def search(self, things: Mapping[str, bytes]) -> dict[str, set[str]]:
        """Name of a thing to what is in it; things with nothing are left out."""
        found = self.tensors.search(things)
        for name, content in things.items():
            if labels := {label for text, label in self.texts.items() if text in content}:
                found[name] = found.get(name, set()) | labels
        return found


def plant(tiny: Tiny, folder: Path, nodes: tuple[str, ...]) -> tuple[Tiny, Canaries]:
    """A tiny world whose users, items and paths are canaries.

    Args:
        tiny: The world.
        folder: Of the nodes' files; it gets ``<node>.csv`` for each and the public ``items.csv``.
        nodes: The nodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    canaries, titles = Canaries(), (TITLE, *TITLES[1:])
    items = write_items(folder / "items.csv", titles)
    for node in nodes:
        own = {f"{USER}-{user}": items for user, items in histories_of(node).items()}
        write_interactions(folder / f"{node}.csv", own)
        canaries.learn_text(str(folder / f"{node}.csv"), "path of interactions")
        canaries.learn_text(f"{node}.private", "path of the private folder")
    canaries.learn_text(USER, "user id")
    for title in titles:
        if len(title) >= 8:
            canaries.learn_text(title, "title")
    return dataclasses.replace(tiny, items=items), canaries
