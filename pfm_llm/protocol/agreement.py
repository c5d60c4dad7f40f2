"""What a server and its nodes must agree on before they train together."""

import dataclasses
import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """Three hashes. Each side computes its own, and a node trains only where all are equal.

    Attributes:
        contract: `UpdateContract.hash`: names and shapes of tensors, backbone, prompt, catalogue.
        tensors: Of the tensors that the server has made once: whitening, codes, and shared tensors
            that nobody trains.
        settings: Of the settings that the server decides; see `settings.settings_of_server`.
    """

    contract: str
    tensors: str
    settings: str

    def hash(self) -> str:
        """SHA-256, in hex, over all of it."""
        return hashlib.sha256("/".join(dataclasses.astuple(self)).encode()).hexdigest()

    def difference(self, other: "Agreement") -> str:
        """The names of what differs, for messages; empty where nothing does."""
        names = [field.name for field in dataclasses.fields(self)]
        return ", ".join(n for n in names if getattr(self, n) != getattr(other, n))
