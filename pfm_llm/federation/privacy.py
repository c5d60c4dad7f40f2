"""The ledger of privacy in the federated loop: it is opened, and each round is paid for."""

import os

from pfm_llm.base.errors import ConfigError
from pfm_llm.base.processes import Processes
from pfm_llm.server.checkpoint import CheckpointStore
from pfm_llm.server.privacy.ledger import Ledger
from pfm_llm.server.privacy.mechanism import PrivateMean, Spent
from pfm_llm.server.privacy.noise import KEY_BYTES
from pfm_llm.server.server import Server


def open_ledger(server: Server, checkpoints: CheckpointStore, processes: Processes) -> None:
    """Go on with the ledger of a run, or begin one; nothing without ``federation.privacy``.

    All processes get the same fresh key, so that they draw the same noise.

    Args:
        server: Its checkpoint is loaded already.
        checkpoints: The commit point of the run; the ledger lies beside it.
        processes: The processes of the run; the main one writes the ledger.

    Raises:
        ConfigError: No noise is enough, or `dp-accounting` is not installed.
        CheckpointError, CorruptFileError: The ledger is not that of the commit point.
        StorageError: It could not be written.
    """
    mechanism = server.privacy
    if mechanism is None:
        return
    opened: list[tuple[int, tuple[Ledger, bytes]]] = []
    with processes.together():
        if processes.is_main:
            path = checkpoints.ledger_path
            ledger = Ledger.read(path)
            if ledger is None:
                ledger = mechanism.new_ledger(os.urandom(KEY_BYTES))
            ledger.path = path
            opened = [(0, (ledger, os.urandom(KEY_BYTES)))]
    [(ledger, key)] = processes.gather(opened)
    if not processes.is_main:
        ledger.path = None
    mechanism.start(ledger, key)
    with processes.together():
        ledger.write()


def last_admitted(mechanism: PrivateMean, first_round: int) -> int:
    """The last round within the budget.

    Args:
        mechanism: With its ledger.
        first_round: The next round.

    Raises:
        ConfigError: The budget is spent before any round.
    """
    last_round = mechanism.admitted(first_round)
    if not last_round:
        raise ConfigError(
            "federation.privacy: the budget admits no round; raise max_epsilon, or raise "
            "noise_multiplier in a new run"
        )
    return last_round


def spent_of(server: Server, checkpoints: CheckpointStore) -> Spent | None:
    """What a run has spent by its ledger; None without ``federation.privacy``, or before round 1.

    Raises:
        CorruptFileError: The ledger is damaged.
    """
    if server.privacy is None:
        return None
    ledger = Ledger.read(checkpoints.ledger_path)
    return None if ledger is None else server.privacy.spent(ledger)
