"""The agents of a host's users: in memory while they are used, one for each folder."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from pfm_llm.agent.agent import PersonalAgent
from pfm_llm.agent.host.accounts import Account, Accounts
from pfm_llm.agent.sync import check_fits
from pfm_llm.base.turns import Turns
from pfm_llm.recommender import Recommender


@dataclass
class _Open:
    """An agent in memory, which one thread uses at a time."""

    turns: Turns = field(default_factory=Turns)
    agent: PersonalAgent | None = None
    num_using: int = 0
    """Threads that use it or wait for it."""


class Users:
    """Agents of users; those that were used least recently are closed.

    An agent that somebody uses is not closed, and no other one is opened on its folder. So there
    may be more in memory than ``most_open``, but no more than threads that use them.

    Args:
        accounts: The users.
        model: The recommender of all.
        most_open: How many idle agents are kept in memory, with what they have read off their
            histories.

    Raises:
        ConfigError: The recommender's private part is trained by steps.
    """

    def __init__(self, accounts: Accounts, model: Recommender, most_open: int = 256) -> None:
        check_fits(model)
        self._accounts, self._model, self._most_open = accounts, model, most_open
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def using(self, account: Account) -> Iterator[PersonalAgent]:
        """The agent of a user, for this block alone; others wait for their turn.

        Raises:
            AccessError: The user has been removed.
        """
        with self._lock:
            mine = self._open.setdefault(account.key, _Open())
            self._open.move_to_end(account.key)
            mine.num_using += 1
        try:
            with mine.turns, self._accounts.held(account):
                if mine.agent is None:
                    mine.agent = PersonalAgent(self._model, account.folder)
                yield mine.agent
        finally:
            with self._lock:
                mine.num_using -= 1
                self._close()

    @property
    def num_open(self) -> int:
        """How many agents are in memory."""
        return len(self._open)

    def _close(self) -> None:
        """Close the agents of removed users, and idle ones beyond the bound."""
        idle = [key for key, one in self._open.items() if not one.num_using]
        there = self._accounts.by_key()
        for key in idle:
            if key not in there or len(self._open) > self._most_open:
                del self._open[key]
