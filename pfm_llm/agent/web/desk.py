"""What a page, programs and assistants may do with one agent; none of it knows the web."""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.agent.actions import Event
from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.data.interactions import TITLE, Catalogue
from pfm_llm.data.titles import TitleSearch


@dataclass(frozen=True)
class Item:
    """An item of the catalogue.

    Attributes:
        item_id: External id.
        title: Its text.
        fields: Its other texts, such as year and genres.
    """

    item_id: str
    title: str
    fields: dict[str, str]


@dataclass(frozen=True)
class TurnedDown:
    """An item that is not shown because the user said so.

    Attributes:
        item: The item.
        less: The user wants less like it.
        until: Until when it is not shown, in seconds since 1970; None: for good.
    """

    item: Item
    less: bool
    until: float | None


class ItemIndex:
    """The items of a catalogue by id and by title; many desks may share it.

    Args:
        catalogue: The items.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._index = {item_id: index for index, item_id in enumerate(catalogue.item_ids)}
        self._titles = TitleSearch(catalogue)

    def item(self, item_id: str) -> Item:
        """An item of the catalogue by its external id.

        Raises:
            DataError: There is no such item.
        """
        if item_id not in self._index:
            raise DataError(f"no item {item_id!r} in the catalogue; search for its title")
        index, texts = self._index[item_id], self._catalogue.fields
        fields = {name: text[index] for name, text in texts.items() if name != TITLE}
        return Item(item_id, texts[TITLE][index], fields)

    def search(self, text: str, most: int = 8) -> list[Item]:
        """Items whose title is about the text, the best match first."""
        return [self.item(item_id) for item_id in self._titles.find(text, most)]


class Desk:
    """One agent and the items that it ranks.

    Args:
        agent: The agent.
        items: Its items.

    Attributes:
        agent: As given.
        items: As given.
    """

    def __init__(self, agent: PersonalAgent, items: ItemIndex) -> None:
        self.agent = agent
        self.items = items

    def history(self) -> list[tuple[Event, Item]]:
        """The events with their items, newest first."""
        return [(event, self.items.item(event.item_id)) for event in reversed(self.agent.history())]

    def turned_down(self) -> list[TurnedDown]:
        """The items that are not shown because the user said so, and were not met."""
        known, now, item = self.agent.known, time.time(), self.items.item
        met = {event.item_id for event in known.events}
        gone = [TurnedDown(item(one), True, None) for one in known.less if one not in met]
        others = sorted(known.hidden - met - set(known.less))
        gone += [TurnedDown(item(one), False, None) for one in others]
        later = [(one, at) for one, at in known.not_before.items() if one not in met and at > now]
        return gone + [
            TurnedDown(item(one), False, at) for one, at in later if one not in known.hidden
        ]

    def files(self) -> dict[str, int]:
        """Name to size in bytes of each file in the agent's folder, but for locks."""
        return {
            path.name: path.stat().st_size
            for path in sorted(self.agent.folder.iterdir())
            if path.is_file() and not path.name.startswith(".")
        }

    def export(self) -> bytes:
        """All that the agent knows, as the bytes of one file."""
        with self._scratch() as path:
            self.agent.export(path)
            return path.read_bytes()

    def import_(self, content: bytes) -> None:
        """Replace all that the agent knows by what `export` gave.

        Raises:
            DataError: It is no export; the agent knows what it knew.
        """
        with self._scratch() as path:
            path.write_bytes(content)
            try:
                self.agent.import_(path)
            except CorruptFileError as error:  # whoever sent the content knows no such path
                raise DataError(str(error).replace(str(path), "the file")) from error

    def _scratch(self) -> "_Scratch":
        return _Scratch(self.agent.folder)


class _Scratch:
    """A file that only the owner can read, and that is gone after the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix=".")

    def __enter__(self) -> Path:
        return Path(self._folder.name) / "your-agent.json"

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def lean(own: float) -> float:
    """Where an item stands between everyone (0) and the user (1).

    With q and p the probabilities of the item by the shared part alone and with the private part,
    it is p / (q + p); ``own`` is log p - log q.
    """
    return 1 / (1 + math.exp(-own))
