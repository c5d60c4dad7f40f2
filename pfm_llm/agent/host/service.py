"""A host: its users, their agents, and the passes that they share."""

from dataclasses import dataclass
from pathlib import Path

from pfm_llm.agent.host.accounts import Accounts
from pfm_llm.agent.host.batcher import Batcher
from pfm_llm.agent.host.serving import hosted
from pfm_llm.agent.host.users import Users
from pfm_llm.recommender import Recommender


@dataclass(frozen=True)
class Bounds:
    """How much a host takes on.

    Attributes:
        batch: The most users in a pass.
        most_waiting: How many rankings may wait for a pass.
        most_open: How many idle agents stay in memory.
        of_one: How many requests of one user may run or wait at a time.
        per_second: How many requests of one user come back in a second.
        burst: How many there are at most.
    """

    batch: int = 64
    most_waiting: int = 256
    most_open: int = 256
    of_one: int = 8
    per_second: float = 20.0
    burst: float = 60.0

    @property
    def at_once(self) -> int:
        """How many requests of all users are worked on at a time; who comes then is refused."""
        return self.batch + self.most_waiting


class HostService:
    """Agents of many users with one model.

    Args:
        root: The folder of all users.
        model: The recommender of all.
        bounds: How much it takes on.

    Attributes:
        bounds: As given.
        catalogue: The items that are ranked.
        accounts: The users.
        batcher: Makes the passes.
        users: The agents.
        is_stopping: Whether it takes no more requests.

    Raises:
        ConfigError: The recommender's private part is trained by steps.
        StorageError: The folder cannot be made.
    """

    def __init__(self, root: Path, model: Recommender, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.catalogue = model.catalogue
        self.accounts = Accounts(root)
        self.batcher = Batcher(model.serving.scores, self.bounds.batch, self.bounds.most_waiting)
        self.users = Users(self.accounts, hosted(model, self.batcher), self.bounds.most_open)
        self.is_stopping = False

    def close(self) -> None:
        """Take no more, and serve all who wait."""
        self.is_stopping = True
        self.batcher.close()
