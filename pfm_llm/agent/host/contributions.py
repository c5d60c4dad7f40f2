"""The histories that users of a host let a node of a federation learn from.

The operator writes them to a file and gives it to a node as its data (docs/deploy.md). In the file
a user is the random name of their folder. Events that do not count are left out, and whoever has
taken their consent back, or was removed, is not in the next file.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.agent.actions import Event, Known
from pfm_llm.agent.folder import AgentFolder
from pfm_llm.agent.host.accounts import Account, Accounts
from pfm_llm.base import files
from pfm_llm.base.errors import AccessError, DataError

COLUMNS = ("user_id", "item_id", "timestamp")
RATING = "rating"
"""A further column where every event has one."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        num_users: Users of the host.
        num_contributing: Those whose histories are in the file.
        num_events: Their events.
    """

    num_users: int
    num_contributing: int
    num_events: int


def write_contributions(accounts: Accounts, path: Path) -> Written:
    """Write the events of all who contribute, as a CSV file that its owner alone can read.

    Args:
        accounts: The users of the host.
        path: The file; what was there is replaced, whole or not at all.

    Raises:
        DataError: Nobody contributes; the file that was there stays.
        StorageError: The file cannot be written.
        CorruptFileError: A user's files are damaged.
    """
    users = accounts.by_key().values()
    found = {one.folder.name: events for one in users if (events := _of(accounts, one))}
    if not found:
        raise DataError(
            "no user of this host lets a federation learn from a history; they switch it on with "
            "contributes: true in their settings"
        )
    files.write_text(path, _as_csv(found))
    return Written(len(users), len(found), sum(map(len, found.values())))


def _as_csv(found: Mapping[str, Sequence[Event]]) -> str:
    is_rated = all(one.rating is not None for events in found.values() for one in events)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, RATING] if is_rated else COLUMNS)
    for user, events in found.items():
        for one in events:
            row = (user, one.item_id, repr(one.at))
            writer.writerow([*row, one.rating] if is_rated else row)
    return text.getvalue()


def _of(accounts: Accounts, account: Account) -> tuple[Event, ...]:
    """The events that a user contributes; none of who was removed meanwhile."""
    try:
        with accounts.held(account):
            folder = AgentFolder(account.folder)
            return Known.of(folder.actions()).counted if folder.settings().contributes else ()
    except AccessError:
        return ()
