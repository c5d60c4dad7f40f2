"""The partition of users into clients."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.base.seeding import numpy_generator
from pfm_llm.data.interactions import Interactions
from pfm_llm.data.splits import TrainData

_MAX_ID_LENGTH = 80
_SAFE_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{_MAX_ID_LENGTH}}}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Client:
    """A participant of the federation.

    Attributes:
        client_id: Unique name, safe as a folder's name: ``user-42`` or ``silo-0007``.
        users: The internal ids of the users whose data it holds, ascending, at least one.
    """

    client_id: str
    users: tuple[int, ...]


def partition(interactions: Interactions, users_per_client: int, seed: int) -> tuple[Client, ...]:
    """Give every user to exactly one client.

    Users with fewer than two training events have no transition to train on. They are clients too,
    because they can be served; training must skip them.

    Args:
        interactions: The users of a whole data set or of its train part; the events do not
            matter.
        users_per_client: 1: a client per user, in the order of the users, named
            ``user-<external id>``. More: silos of so many users drawn at random, named
            ``silo-0000`` and so on; the last one may hold fewer.
        seed: The experiment's seed; only silos depend on it.

    Returns:
        The clients. An external id that is no safe file name (other characters than
        ``A-Za-z0-9._-``, empty, very long, or equal to another but for case) gets a short hash
        at its end.

    Raises:
        ConfigError: ``users_per_client`` is below 1.
        DataError: Two users would get the same name, as one's id imitates the other's hash.
    """
    if users_per_client < 1:
        raise ConfigError(f"data.users_per_client: must be at least 1, not {users_per_client}")
    if users_per_client == 1:
        names = _client_ids(interactions.user_ids)
        return tuple(Client(name, (user,)) for user, name in enumerate(names))
    shuffled = numpy_generator(seed, "partition").permutation(interactions.num_users)
    starts = range(0, len(shuffled), users_per_client)
    width = max(4, len(str(len(starts) - 1)))
    return tuple(
        Client(
            f"silo-{number:0{width}d}",
            tuple(sorted(int(user) for user in shuffled[start : start + users_per_client])),
        )
        for number, start in enumerate(starts)
    )


def trainable(clients: Sequence[Client], train: TrainData) -> tuple[str, ...]:
    """Ids of the clients that have at least one transition to train on."""
    lengths = np.diff(train.interactions.offsets)
    return tuple(c.client_id for c in clients if lengths[list(c.users)].max() >= 2)


def _client_ids(external_ids: Sequence[str]) -> list[str]:
    # Some file systems ignore case: there user-A and user-a would share a private folder.
    folded = Counter(external.casefold() for external in external_ids)
    names = [
        f"user-{external}"
        if _SAFE_ID.fullmatch(external) and folded[external.casefold()] == 1
        else _hashed_id(external)
        for external in external_ids
    ]
    twice = [name for name, count in Counter(map(str.casefold, names)).items() if count > 1]
    if twice:
        raise DataError(
            f"two users would both be client {twice[0]!r}; rename one of them in the source"
        )
    return names


def _hashed_id(external: str) -> str:
    digest = hashlib.blake2b(external.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    return f"user-{_UNSAFE.sub('_', external[:_MAX_ID_LENGTH])}-{digest}"
