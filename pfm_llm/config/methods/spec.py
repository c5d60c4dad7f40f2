"""The type of a method: settings that it fixes, and shared tensors that it does not train."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MethodSpec:
    """A method of federated adaptation, in terms of this system's settings.

    Attributes:
        settings: Dotted key of the config to the value that the method fixes.
        frozen: Patterns (as of `fnmatch`) of shared tensors that stay as they were at the start;
            nobody sends them.
    """

    settings: Mapping[str, Any]
    frozen: tuple[str, ...] = ()

    @property
    def shares_nothing(self) -> bool:
        """Whether no shared tensor is trained, so that clients have nothing to send."""
        return "*" in self.frozen

    def trains(self, name: str) -> bool:
        """Whether a shared tensor is trained and sent."""
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.frozen)
