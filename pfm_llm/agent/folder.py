"""The folder of one user's agent: their actions, their settings, and an account of what was sent.

Only its owner can read it (0700). Every file is written whole or not at all. Nothing that was made
from the actions is kept, so that what is deleted here is gone.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pfm_llm.agent.actions import Action
from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.locks import locked

ACTIONS, SETTINGS, LEDGER, LOCK = "actions.json", "settings.json", "ledger.json", ".lock"
ADAPTERS, IN_USE = "adapters", "in_use.json"
FORMAT = "pfm-agent/1"
"""Of the file of an export, which holds actions and settings as they are here."""


_LIST = TypeAdapter(list[Action])


class Settings(BaseModel):
    """What the user has set.

    Attributes:
        weight: Factor on the private part, 0 to 1.5; None: as training chose it.
        paused: Nothing is learned or kept at present.
        contributes: The user lets a node of a federation learn from their history.
        strength: How strongly "less like this" acts, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float | None = Field(None, ge=0, le=1.5)
    paused: bool = False
    contributes: bool = False
    strength: float = Field(1.0, ge=0, le=1)


class AgentFolder:
    """One user's folder; several processes may use it at a time.

    Args:
        path: The folder. It is made if it is missing, and its mode becomes 0700.

    Raises:
        StorageError: It cannot be made, or is not a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = files.make_private_dir(path)

    def actions(self) -> list[Action]:
        """All actions, in the order in which they came.

        Raises:
            CorruptFileError: The file is damaged.
        """
        content = self._read(ACTIONS, [])
        return _parsed(content, self.path / ACTIONS)

    def settings(self) -> Settings:
        """The user's settings.

        Raises:
            CorruptFileError: The file is damaged.
        """
        return _settings(self._read(SETTINGS, {}), self.path / SETTINGS)

    def change(self, new: Callable[[list[Action]], Sequence[Action]]) -> None:
        """Write what a function makes of the actions; no other process changes them meanwhile."""
        with self._locked():
            content = [_plain(action) for action in new(self.actions())]
            files.write_json(self.path / ACTIONS, content)

    def set(self, **values: Any) -> Settings:
        """Change settings.

        Raises:
            DataError: A value is out of range.
        """
        with self._locked():
            try:
                settings = Settings(**(self.settings().model_dump() | values))
            except ValidationError as error:
                raise DataError(f"the agent's settings: {_first(error)}") from error
            files.write_json(self.path / SETTINGS, settings.model_dump())
        return settings

    def ledger(self) -> list[dict[str, Any]]:
        """What came and went: one entry for each adapter that was fetched, the oldest first.

        Raises:
            CorruptFileError: The file is damaged.
        """
        found = self._read(LEDGER, [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise CorruptFileError(f"{self.path / LEDGER} is no list of entries; delete it")
        return found

    def note(self, **entry: Any) -> None:
        """Add an entry to the ledger."""
        with self._locked():
            files.write_json(self.path / LEDGER, [*self.ledger(), entry])

    def adapters(self) -> list[Path]:
        """Folders of the adapter in use and of those before it, the newest first.

        Raises:
            CorruptFileError: The file is damaged.
        """
        names = self._read(IN_USE, [])
        if not isinstance(names, list) or not all(_is_hash(name) for name in names):
            raise CorruptFileError(f"{self.path / IN_USE} is no list of adapters; sync again")
        return [self.path / ADAPTERS / name for name in names]

    def keep_adapter(self, folder: Path, name: str) -> None:
        """Copy an adapter and use it from now on; the one before it is kept too.

        Args:
            folder: Its files.
            name: The hash that identifies it.
        """
        with self._locked():
            target = self.path / ADAPTERS / name
            copy = target.with_suffix(".new")
            with files.storage_errors(copy):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(folder, copy)
                shutil.rmtree(target, ignore_errors=True)
                copy.rename(target)
            before = [path.name for path in self.adapters() if path.name != name]
            self._use([name, *before[:1]])

    def drop_adapter(self) -> Path | None:
        """Go back to the adapter before the one in use; None where there is none."""
        with self._locked():
            found = self.adapters()
            if len(found) < 2:
                return None
            self._use([path.name for path in found[1:]])
            return found[1]

    def _use(self, names: list[str]) -> None:
        files.write_json(self.path / IN_USE, names)
        for path in (self.path / ADAPTERS).iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def export(self) -> dict[str, Any]:
        """All that the folder holds, as plain JSON."""
        actions = [_plain(action) for action in self.actions()]
        return {"format": FORMAT, "settings": self.settings().model_dump(), "actions": actions}

    def import_(self, content: Any, origin: Path) -> None:
        """Replace all that the folder holds by what `export` made.

        Raises:
            CorruptFileError: It is no export; the folder is as it was.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CorruptFileError(
                f"{origin} is no export of an agent ({FORMAT}); give a file that export wrote"
            )
        actions = _parsed(content.get("actions"), origin)
        settings = _settings(content.get("settings"), origin)
        with self._locked():
            files.write_json(self.path / ACTIONS, [_plain(action) for action in actions])
            files.write_json(self.path / SETTINGS, settings.model_dump())

    def destroy(self) -> None:
        """Delete the folder with all that is in it."""
        with files.storage_errors(self.path):
            shutil.rmtree(self.path)
        files.make_private_dir(self.path)

    def _locked(self) -> Any:
        return locked(self.path / LOCK, f"waiting for another process at {self.path}", wait=True)

    def _read(self, name: str, empty: Any) -> Any:
        try:
            return files.read_json(self.path / name)
        except FileNotFoundError:
            return empty


def _is_hash(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9a-f]{64}", name) is not None


def _parsed(content: Any, origin: Path) -> list[Action]:
    if not isinstance(content, list):
        raise CorruptFileError(f"{origin}: the actions are no list; import an export instead")
    try:
        return _LIST.validate_json(json.dumps(content))
    except ValidationError as error:
        raise CorruptFileError(f"{origin}: an action cannot be read: {_first(error)}") from error


def _settings(content: Any, origin: Path) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise CorruptFileError(f"{origin}: {_first(error)}") from error


def _plain(action: Action) -> dict[str, Any]:
    return action.model_dump(mode="json", exclude_none=True)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]
