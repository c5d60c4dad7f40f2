"""LoRA folders of a tiny model, for the tests of what leaves for a device."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_models import TinyCohort


@dataclass(frozen=True)
class Folders:
    """PEFT folders below ``root``."""

    root: Path

    @property
    def shared(self) -> Path:
        """The shared LoRA."""
        return self.root / "shared"

    @property
    def private(self) -> Path:
        """A private one."""
        return self.root / "private"


def write_folders(cohort: TinyCohort, root: Path, weight: float = 1.0) -> Folders:
    """Write the shared LoRA of a client, and the private one with a weight, away from zero."""
    tensors, folders = cohort.client_tensors(seed=4), Folders(root)
    cohort.adapter.export_shared(tensors, folders.shared, "tiny")
    own = cohort.private.own_lora(tensors, weight)
    cohort.adapter.export_private(own, folders.private, "tiny")
    return folders
