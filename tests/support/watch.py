"""Taps every boundary of a run, and after every round searches all that passed it."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.processes import Processes
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.federation import rounds
from pfm_llm.model.private import PrivatePart
from pfm_llm.model.private.lora import IndependentLora
from pfm_llm.model.private.taste import UserEmbedding
from pfm_llm.protocol.masks.words import FixedPoint
from pfm_llm.protocol.types import PrivateState
from pfm_llm.runs import experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.server.masked_round import MaskedRound
from pfm_llm.server.server import Server
from tests.support.leaks import Hunt, files_below


class Watch(logging.Handler):
    """Watches one run.

    Attributes:
        hunt: What is looked for; it learns each private state when its client stores it.
        found: Place to labels of what was found there.
        searched: Names of all places that were searched.
        searches: The rounds after which a search was made.
        states: The newest private state of each client.
    """

    def __init__(self, public: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(logging.DEBUG)
        self.hunt = Hunt()
        self.found: dict[str, set[str]] = {}
        self.searched: set[str] = set()
        self.searches: list[int] = []
        self.states: dict[str, PrivateState] = {}
        self._public = public
        self._passed: list[tuple[str, bytes]] = []
        self._log_lines: list[str] = []
        self._tap(patch)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log line, as it would be written."""
        self._log_lines.append(self.format(record))

    def search(self) -> None:
        """Search what has passed since the last search, the public folder and the server's."""
        things = {f"{name} {number}": raw for number, (name, raw) in enumerate(self._passed)}
        things["log"] = "\n".join(self._log_lines).encode()
        self._passed.clear()
        things |= files_below(self._public)
        server = RunFolders.of(self._public).server
        things |= {f"server/{name}": content for name, content in files_below(server).items()}
        self.searched |= {name.rsplit(" ", 1)[0] for name in things}
        for name, labels in self.hunt.search(things).items():
            self.found.setdefault(name.rsplit(" ", 1)[0], set()).update(labels)

    def _tap(self, patch: pytest.MonkeyPatch) -> None:
        def before(owner: Any, name: str, look: Callable[..., None]) -> None:
            original = getattr(owner, name)

            def tapped(*args: Any, **kwargs: Any) -> Any:
                look(*args, **kwargs)
                return original(*args, **kwargs)

            patch.setattr(owner, name, tapped)

        before(Processes, "gather", lambda _, pieces: self._pass("gather", pieces))
        before(Server, "receive", lambda _, total, update: self._pass("update", update))
        before(FixedPoint, "encode", lambda _, update: self._pass("update", update))
        before(MaskedRound, "add", lambda _, update: self._pass("masked update", update))
        for module in (rounds, experiment):
            before(module, "log_to_trackers", lambda _, values, step: self._pass("tracker", values))
        before(PrivateStore, "save", lambda _, state: self._learn(state))
        before(PrivateStore, "save_personalised", lambda _, state: self._learn(state))
        self._learn_initial(patch)
        self._search_after_commits(patch)

    def _pass(self, name: str, thing: Any) -> None:
        self._passed.append((name, pickle.dumps(thing)))
        if name == "tracker":
            self._passed.append((name, json.dumps(thing, default=str).encode()))

    def _learn(self, state: PrivateState) -> None:
        self.states[state.client_id] = state
        self.hunt.learn(state.client_id, state.tensors)

    def _learn_initial(self, patch: pytest.MonkeyPatch) -> None:
        """So that the first change of each tensor is known too."""
        for kind in (IndependentLora, UserEmbedding):
            original = kind.initial

            def tapped(part: PrivatePart, client_id: str, original: Any = original) -> Any:
                tensors = original(part, client_id)
                if client_id not in self.states:
                    self.hunt.learn(client_id, tensors)
                return tensors

            patch.setattr(kind, "initial", tapped)

    def _search_after_commits(self, patch: pytest.MonkeyPatch) -> None:
        original = rounds.commit

        def tapped(federation: Any, round_number: int) -> None:
            original(federation, round_number)
            self.search()
            self.searches.append(round_number)

        patch.setattr(rounds, "commit", tapped)
