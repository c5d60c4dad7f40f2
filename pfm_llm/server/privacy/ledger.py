"""What a run has released under noise, in a file that only grows.

A release is written here before its noise is drawn. A process that is killed between the two has
paid for nothing. One that is killed before the round is committed pays again for the same round.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pfm_llm.base.errors import CorruptFileError, StorageError
from pfm_llm.base.files import make_private_dir, read_json, write_json
from pfm_llm.server.privacy.noise import KEY_BYTES


@dataclass
class Ledger:
    """The releases of a run.

    Attributes:
        path: Its file; None where another process writes it.
        noise_multiplier: The noise of each release.
        secret: The key by which cohorts are drawn, if they are.
        schedule: Hash of what decides who takes part; see `PrivateMean.schedule`.
        releases: How often each round was released, from round 1.
    """

    path: Path | None
    noise_multiplier: float
    secret: bytes
    schedule: str
    releases: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of releases."""
        return sum(self.releases)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The ledger of a run; None where nothing was written yet.

        Raises:
            CorruptFileError: The file is damaged.
        """
        try:
            found = read_json(path)
            secret = bytes.fromhex(found["secret"])
            releases = [int(number) for number in found["releases"]]
            if len(secret) != KEY_BYTES or min(releases, default=1) < 0:
                raise ValueError("a value is out of range")
            noise, schedule = float(found["noise_multiplier"]), str(found["schedule"])
            return cls(path, noise, secret, schedule, releases)
        except FileNotFoundError:
            return None
        except (StorageError, OSError, LookupError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{path} is damaged ({error!r}), and without it nobody knows what the run has "
                "spent; restore it from a backup, or start a new run"
            ) from error

    def charge(self, round_number: int) -> None:
        """Write down one release more of a round, from 1.

        Raises:
            DiskSpaceError, StorageError: It could not be written.
        """
        self.releases += [0] * (round_number - len(self.releases))
        self.releases[round_number - 1] += 1
        self.write()

    def write(self) -> None:
        """Write the file; see `charge`."""
        if self.path is None:
            return
        make_private_dir(self.path.parent)
        tree = {
            "noise_multiplier": self.noise_multiplier,
            "secret": self.secret.hex(),
            "schedule": self.schedule,
            "releases": self.releases,
        }
        write_json(self.path, tree)
