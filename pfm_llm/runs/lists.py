"""What the private part changes for a user: three lists side by side.

The first comes from the shared part alone, the second adds the user's own private part, the third
adds the private part of somebody else. All three continue the same history, the one that the test
query shows, and leave out what it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pfm_llm.base import files
from pfm_llm.base.errors import DataError
from pfm_llm.evaluation import scoring
from pfm_llm.evaluation.evaluator import EvaluationTask
from pfm_llm.evaluation.scorer import UserVectors
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import evaluation_task, only
from pfm_llm.runs.run import Run, Trained

LISTS_FILE = "lists.json"
LENGTH = 5
_SHOWN_OF_HISTORY = 3
_PERCENTILES = (10, 50, 90)
_WIDTH = 38
_HEADINGS = ("shared part alone", "with their private part", "with another user's")


@dataclass(frozen=True)
class UserLists:
    """The lists of one user.

    Attributes:
        user: External id.
        other: External id of the user whose private part the third list has.
        history_length: Items in the history that is continued.
        newest: Titles of its newest items, the newest last.
        held_out: Titles of what the user met next.
        shared: Titles, the best first, by the shared part alone.
        own: By the shared part and the user's own private part.
        other_own: By the shared part and the other user's private part.
    """

    user: str
    other: str
    history_length: int
    newest: tuple[str, ...]
    held_out: tuple[str, ...]
    shared: tuple[str, ...]
    own: tuple[str, ...]
    other_own: tuple[str, ...]

    def markdown(self) -> str:
        """A table of the lists. A ``+`` marks what the list of the shared part does not have."""
        head = " | ".join(_HEADINGS)
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self._rows())
        # No id and no title of the history: a page may be shown to anybody.
        who = f"A user with {self.history_length} items in the history."
        return f"{who}\n\n| {head} |\n| --- | --- | --- |\n{rows}"

    def text(self) -> str:
        """The same for a terminal, in columns."""
        who = (
            f"User {self.user} met {self.history_length} items, the newest of them "
            f"{', '.join(self.newest)}. Next came {', '.join(self.held_out)}. "
            f"The other user is {self.other}."
        )
        return "\n  ".join([who, *map(_columns, [_HEADINGS, *self._rows()])])

    def _rows(self) -> list[tuple[str, ...]]:
        def marked(titles: Sequence[str]) -> list[str]:
            return [title if title in self.shared else f"+ {title}" for title in titles]

        return list(zip(self.shared, marked(self.own), marked(self.other_own), strict=True))


def example_users(run: Run) -> list[str]:
    """The users whose lists a run shows: at the 10th, 50th and 90th percentile of history length.

    Of users with equally long histories it is the first. Nobody chose them by their lists.
    """
    test = run.data.split.test
    lengths = np.array([len(items) for items in test.histories])
    order = np.lexsort((test.users, lengths))
    places = {round(percentile / 100 * (len(order) - 1)) for percentile in _PERCENTILES}
    return [run.data.interactions.user_ids[int(test.users[order[p]])] for p in sorted(places)]


def compare_lists(run: Run, trained: Trained, user: str, length: int = LENGTH) -> UserLists:
    """The three lists of a user.

    Args:
        run: The run; it has private parts.
        trained: What training left.
        user: External id of a user with a test query.
        length: Items in a list.

    Raises:
        DataError: The run has no private parts, has no such user, or tests nothing of theirs.
    """
    if not run.config.adapters.private.enabled:
        raise DataError("this run has no private parts to compare; see adapters.private.enabled")
    interactions, test = run.data.interactions, run.data.split.test
    number = interactions.user(user)
    task = evaluation_task(run, trained, test, [Mode.SHARED_ONLY, Mode.SHARED_PRIVATE])
    if number not in task.query_of:
        raise DataError(f"user {user!r} has no item in test, so nothing shows what came next")
    query = task.query_of[number]
    other = int(test.users[(query + len(test.users) // 2) % len(test.users)])
    seen, titles = test.histories[query], interactions.catalogue.fields["title"]

    def named(items: np.ndarray) -> tuple[str, ...]:
        return tuple(titles[item] for item in items.tolist())

    shared, own, other_own = (
        named(scoring.top_items(scores, seen, length)[0])
        for scores in _three(run, task, number, other)
    )
    return UserLists(
        user=user,
        other=interactions.user_ids[other],
        history_length=len(seen),
        newest=named(seen[-_SHOWN_OF_HISTORY:]),
        held_out=named(test.targets[query][:1]),
        shared=shared,
        own=own,
        other_own=other_own,
    )


def write_lists(run: Run, trained: Trained) -> None:
    """Compare the lists of `example_users`, and keep them in the run's private folder."""
    found = [compare_lists(run, trained, user) for user in example_users(run)]
    files.write_json(run.folders.private / LISTS_FILE, {"lists": [asdict(one) for one in found]})


def read_lists(content: Mapping[str, Sequence[Mapping[str, object]]]) -> list[UserLists]:
    """What `write_lists` kept."""
    return [
        UserLists(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})  # type: ignore[arg-type]
        for one in content["lists"]
    ]


def _three(run: Run, task: EvaluationTask, user: int, other: int) -> list[np.ndarray]:
    """Scores [I] for the user's query: shared alone, with the own part, with the other's."""
    client_of, score = run.clients.histories.client_of, run.evaluator.score_chunk
    client, lender = (client_of(one) for one in (user, other))
    known: UserVectors = {}
    private_mode = only(task, Mode.SHARED_PRIVATE)
    own = score([client], task, known=known)
    lent = score([client], private_mode, score([lender], private_mode).private, known)
    row = own.order.index(task.query_of[user])
    return [
        own.scores[Mode.SHARED_ONLY][row],
        own.scores[Mode.SHARED_PRIVATE][row],
        lent.scores[Mode.SHARED_PRIVATE][row],
    ]


def _columns(cells: Sequence[str]) -> str:
    cut = [c if len(c) <= _WIDTH else c[: _WIDTH - 1] + "…" for c in cells]
    return "  ".join(f"{cell:{_WIDTH}}" for cell in cut).rstrip()
