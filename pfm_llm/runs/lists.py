"""What the private part changes for one user, as lists side by side.

The first list comes from the shared part alone, the second adds the user's own private part, the
third adds the private part of another user. All continue the user's whole history, and show new
items, as serving does.
A list is somebody's: a run keeps those of its example users in its private folder.

The order of the users is by length of history, and by internal id where it is equal. The other
user stands half the order away; where both are of one client, it is the next user of another one.
"""

import html
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, DataError
from pfm_llm.base.terminal import fitted, harmless
from pfm_llm.data.interactions import TITLE
from pfm_llm.evaluation.evaluator import parts_of
from pfm_llm.evaluation.new_places import NewPlaces
from pfm_llm.evaluation.results import judged_mode
from pfm_llm.model.new_items import unmet_items
from pfm_llm.protocol.types import Tensors
from pfm_llm.publish.alignment import Alignment
from pfm_llm.runs.run import Run, Trained

LISTS_FILE = "lists.json"
"""In a run's private folder: the lists of the example users."""

LENGTH = 5
"""Items in a list, where nobody asks for more."""

MARK = "+ marks what the list of the shared part does not have."

_HEADINGS = {
    "shared": "shared part alone",
    "own": "with their private part",
    "other": "with another user's",
}
_PERCENTILES = (10, 50, 90)
_NEWEST = 3
_WIDTH = 100  # of a terminal
_COLUMN = 30  # three of them, with places and gaps, take 97


@dataclass(frozen=True)
class Listed:
    """One item of a list.

    Attributes:
        item_id: The catalogue's external id.
        title: Its text.
        is_new: The list of the shared part does not have the item.
    """

    item_id: str
    title: str
    is_new: bool


@dataclass(frozen=True)
class UserLists:
    """The lists of one user.

    Attributes:
        user: External id; empty where nobody is to be named.
        history_length: Number of items in the history.
        newest: Titles of its newest items, the newest last; empty where nobody is to be named.
        lists: ``shared``, ``own`` and ``other``, in this order, to items, the best first. It is
            ``shared`` alone where no private part of the user is kept or it has no weight, and
            there is no ``other`` where no other client's part is kept.
    """

    user: str
    history_length: int
    newest: tuple[str, ...]
    lists: Mapping[str, tuple[Listed, ...]]

    def text(self) -> str:
        """The lists for a terminal."""
        who = f"User {harmless(self.user)}" if self.user else "A user"
        who = f"{who} with {self.history_length} items in the history"
        if self.newest:
            who += f"; the newest: {', '.join(map(harmless, self.newest))}"
        lines = textwrap.wrap(who, _WIDTH, subsequent_indent="   ")
        lines += map(_line, self._rows(lambda title, is_new: ("+ " if is_new else "  ") + title))
        if len(self.lists) == 1:
            lines.append(
                "   There is one list: the run keeps no private part that serves the user."
            )
        return "\n".join(lines)

    def markdown(self) -> str:
        """The lists as a table of Markdown, which names nobody and shows no history."""
        rows = self._rows(lambda title, is_new: _escaped(f"+ {title}" if is_new else title))
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        rule = f"| ---: |{' --- |' * len(self.lists)}"
        who = f"A user with {self.history_length} items in the history."
        return "\n".join([who, "", head, rule, *body])

    def _rows(self, cell: Callable[[str, bool], str]) -> Iterable[Sequence[str]]:
        """The head and the rows, each with its place first."""
        yield ["", *(cell(_HEADINGS[name], False) for name in self.lists)]
        for place, items in enumerate(itertools.zip_longest(*self.lists.values()), 1):
            yield [str(place), *(cell(harmless(i.title), i.is_new) if i else "" for i in items)]


def example_users(run: Run) -> list[str]:
    """External ids of the users whose lists a run shows, of all that have a test query.

    They stand at the 10th, 50th and 90th percentile of the order, so that nobody chose them by
    their lists. There are fewer than three where there are fewer users.
    """
    order = _by_length(run, run.data.split.test.users.tolist())
    places = {round((len(order) - 1) * percentile / 100) for percentile in _PERCENTILES}
    return [run.data.interactions.user_ids[order[place]] for place in sorted(places) if order]


def compare_lists(
    run: Run,
    trained: Trained,
    user: str,
    k: int = LENGTH,
    new_share: float | None = None,
    alignment: Alignment | None = None,
) -> UserLists:
    """The lists of a user.

    Args:
        run: The run; its clients keep their private parts.
        trained: The shared state, and the weight of private parts.
        user: External id.
        k: Items in a list; there are fewer where the history leaves fewer.
        new_share: The share of the places that new items have at least; see `new_places`.
        alignment: How the items fit those of the training; None: they are the same.

    Raises:
        DataError: The run has no such user, or the user has no history.
        ConfigError: ``new_share`` is not in [0, 1].
        CorruptFileError: A kept private part is damaged.
    """
    places, interactions = NewPlaces(new_share), run.data.interactions
    number = interactions.user(user)
    history = interactions.history_of(number)
    if not len(history):
        raise DataError(f"user {user!r} has no history to continue")
    fit = alignment or Alignment.of_equal(len(interactions.catalogue))
    is_new = fit.new_items(unmet_items(trained.shared.tensors, run.model.codes))
    ids, titles = interactions.catalogue.item_ids, interactions.catalogue.fields[TITLE]
    best: dict[str, list[int]] = {}
    for name, private in _parts(run, trained, number).items():
        scores = run.scorer.score(
            {run.clients.histories.client_of(number): [history]},
            run.scorer.stack(trained.shared, private, 1),
            parts_of([judged_mode(bool(private))], trained.private_weight),
        )
        [row] = scores.values()
        best[name] = places.top_items(row[0], history.items, k, is_new)[0].tolist()
    lists = {
        name: tuple(Listed(ids[item], titles[item], item not in best["shared"]) for item in items)
        for name, items in best.items()
    }
    newest = tuple(titles[item] for item in history.items[-_NEWEST:].tolist())
    return UserLists(user, len(history), newest, lists)


def compare_examples(
    run: Run,
    trained: Trained,
    k: int = LENGTH,
    new_share: float | None = None,
    alignment: Alignment | None = None,
) -> list[UserLists]:
    """The lists of `example_users`; see `compare_lists`."""
    users = example_users(run)
    return [compare_lists(run, trained, user, k, new_share, alignment) for user in users]


def lists_tree(lists: Iterable[UserLists]) -> dict[str, object]:
    """The content of a file of lists, for JSON."""
    return {"lists": [asdict(one) for one in lists]}


def write_lists(run: Run, trained: Trained) -> None:
    """Keep the lists of the example users in the run's private folder."""
    files.write_json(run.folders.private / LISTS_FILE, lists_tree(compare_examples(run, trained)))


def read_lists(path: Path) -> list[UserLists]:
    """The lists in a file of `write_lists`.

    Raises:
        CorruptFileError: It holds something else, or is no JSON.
    """
    try:
        return [
            UserLists(
                user=str(one["user"]),
                history_length=int(one["history_length"]),
                newest=tuple(map(str, one["newest"])),
                lists={
                    name: tuple(Listed(**item) for item in items)
                    for name, items in one["lists"].items()
                },
            )
            for one in files.read_json(path)["lists"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} holds no lists ({error!r}); evaluate the run") from error


def _by_length(run: Run, users: Iterable[int]) -> list[int]:
    return sorted(users, key=lambda user: (len(run.data.interactions.history(user)), user))


def _parts(run: Run, trained: Trained, user: int) -> dict[str, Tensors]:
    """Stacked private tensors [1, ...] for each list."""
    found: dict[str, Tensors] = {"shared": {}}
    if not (run.config.adapters.private.enabled and trained.private_weight):
        return found
    client_of, rounds = run.clients.histories.client_of, trained.shared.round_number
    owners = {"own": client_of(user)}
    order = _by_length(run, {*run.data.split.test.users.tolist(), user})
    place = order.index(user) + len(order) // 2
    others = (client_of(order[(place + step) % len(order)]) for step in range(len(order)))
    if other := next((client for client in others if client != owners["own"]), None):
        owners["other"] = other
    for name, client in owners.items():
        state = run.clients.store.serving(client, rounds)
        if state is None:
            break  # another user's part says nothing where there is no own one to compare
        found[name] = {key: value[None] for key, value in state.tensors.items()}
    return found


def _line(cells: Sequence[str]) -> str:
    place, *titles = cells
    return f"{place:>2} {'  '.join(fitted(title, _COLUMN) for title in titles)}".rstrip()


def _escaped(text: str) -> str:
    """The text, in which Markdown and HTML find nothing of theirs."""
    plain = html.escape(text, quote=False)
    return re.sub(r"[|*_`~\\\[\]]", lambda found: f"&#{ord(found[0])};", plain)
