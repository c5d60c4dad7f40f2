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
from pfm_llm.evaluation.evaluator import ChunkScores, EvaluationTask
from pfm_llm.protocol.types import Mode
from pfm_llm.runs.measuring import evaluation_task, only
from pfm_llm.runs.run import Run, Trained

LISTS_FILE = "lists.json"
LENGTH = 5
_SHOWN_OF_HISTORY = 3
_PERCENTILES = (10, 50, 90)
_WIDTH = 38
_HEADINGS = {
    "shared": "shared part alone",
    "own": "with their private part",
    "other": "with another user's",
}


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
        head = " | ".join(_HEADINGS.values())
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self._rows())
        # No id and no title of the history: a page may be shown to anybody.
        who = f"A user with {self.history_length} items in the history."
        return f"{who}\n\n| {head} |\n| --- | --- | --- |\n{rows}"

    def text(self) -> str:
        """The same for a terminal, in columns."""
        lines = [self._title(), *(map(_columns, [tuple(_HEADINGS.values()), *self._rows()]))]
        return "\n  ".join(lines)

    def _title(self) -> str:
        after = ", ".join(self.newest)
        return (
            f"User {self.user} met {self.history_length} items, the newest of them {after}. "
            f"Next came {', '.join(self.held_out)}. The other user is {self.other}."
        )

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
    if user not in run.data.interactions.user_ids:
        raise DataError(f"no user {user!r} in the data")
    test, number = run.data.split.test, run.data.interactions.user_ids.index(user)
    task = evaluation_task(run, trained, test, [Mode.SHARED_ONLY, Mode.SHARED_PRIVATE])
    if number not in task.query_of:
        raise DataError(f"user {user!r} has no item in test, so nothing shows what came next")
    query = task.query_of[number]
    other = int(test.users[(query + len(test.users) // 2) % len(test.users)])
    scores = _three(run, task, number, other)
    seen, titles = test.histories[query], run.data.interactions.catalogue.fields["title"]

    def named(items: np.ndarray) -> tuple[str, ...]:
        return tuple(titles[item] for item in items.tolist())

    def best(which: str) -> tuple[str, ...]:
        return named(scoring.top_items(scores[which], seen, length)[0])

    return UserLists(
        user=user,
        other=run.data.interactions.user_ids[other],
        history_length=len(seen),
        newest=named(seen[-_SHOWN_OF_HISTORY:]),
        held_out=named(test.targets[query][:1]),
        shared=best("shared"),
        own=best("own"),
        other_own=best("other"),
    )


def write_lists(run: Run, trained: Trained) -> list[UserLists]:
    """Compare the lists of `example_users`, and keep them in the run's private folder."""
    found = [compare_lists(run, trained, user) for user in example_users(run)]
    files.write_json(run.folders.private / LISTS_FILE, {"lists": [asdict(one) for one in found]})
    return found


def read_lists(content: Mapping[str, Sequence[Mapping[str, object]]]) -> list[UserLists]:
    """What `write_lists` kept."""
    return [
        UserLists(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})  # type: ignore[arg-type]
        for one in content["lists"]
    ]


def _three(run: Run, task: EvaluationTask, user: int, other: int) -> dict[str, np.ndarray]:
    """Scores [I] for the user's query: shared alone, with the own part, with the other's."""
    client_of, score = run.clients.histories.client_of, run.evaluator.score_chunk
    client, lender = (client_of(one) for one in (user, other))
    own = score([client], task)
    lent = score([client], task, score([lender], only(task, Mode.SHARED_PRIVATE)).private)

    def row(scored: ChunkScores, mode: Mode) -> np.ndarray:
        return scored.scores[mode][scored.order.index(task.query_of[user])]

    return {
        "shared": row(own, Mode.SHARED_ONLY),
        "own": row(own, Mode.SHARED_PRIVATE),
        "other": row(lent, Mode.SHARED_PRIVATE),
    }


def _columns(cells: Sequence[str]) -> str:
    cut = [c if len(c) <= _WIDTH else c[: _WIDTH - 1] + "…" for c in cells]
    return "  ".join(f"{cell:{_WIDTH}}" for cell in cut).rstrip()
