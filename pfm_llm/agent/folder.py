"""The folder of one user's agent: their actions, their settings, and an account of what was sent.

Only its owner can read it (0700). Every file is written whole or not at all. Nothing that was made
from the actions is kept, so that what is deleted here is gone.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pfm_llm.agent.actions import Action
from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.locks import locked

ACTIONS, SETTINGS, LOCK = "actions.json", "settings.json", ".lock"
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
