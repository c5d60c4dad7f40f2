"""Tables that `datasets` loads: by the id of a data set, or by the name of a builder and files."""

import ast
import hashlib
import heapq
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pfm_llm.base.errors import DataError
from pfm_llm.config.data import BUILDERS, HubTableConfig
from pfm_llm.data.columns import is_usual, untyped
from pfm_llm.data.formats.arrow_table import from_arrow, from_schema
from pfm_llm.data.tables import LazyColumns, Table

_BATCH = 10_000  # rows
_OFFLINE = (
    "if there is no network, save the data set with save_to_disk where there is one, and give that "
    "folder as data.source"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIST = re.compile(r"\[[^\[\]]*\]")
_PATIENCE = 10  # seconds
_LONGEST = 600  # characters of an error of `datasets`
_PLACE = ""  # the name of no column
_POOL = 4
"""Users that a stream keeps for each that is wanted: some of them have too few events."""


class HubTable:
    """A table of a data set that was found but not yet read.

    A branch or tag is resolved to its commit, which is then read.

    Args:
        asked: Which data set, and what of it.
        key: Its place in a config, for messages.

    Attributes:
        files: Files of this machine on whose content the table depends.
        version: What else it depends on: the commit of the Hub, or of files elsewhere their state.
        origin: Its name and the commit of the Hub, in words; None for files elsewhere.

    Raises:
        DataError: The data set, or a part of it, cannot be found or loaded; or there is another
            commit in the cache alone than the one that was asked for.
    """

    def __init__(self, asked: HubTableConfig, key: str) -> None:
        self._asked, self._key, self._name = asked, key, f"{asked.name} ({key})"
        with_files = {} if asked.files is None else {"data_files": _plain(asked.files)}
        commit = self._tried(lambda: _commit(asked))
        wanted = commit or asked.revision
        self._builder = self._tried(
            lambda: datasets.load_dataset_builder(
                asked.name, asked.config, revision=wanted, **with_files
            )
        )
        found_commit = self._found_commit(wanted)
        self._rows, self._notes = self._split()
        origins = self._builder.config.data_files or {}
        places = [str(place) for files in origins.values() for place in files]
        found = [Path(place) for place in places if "://" not in place]
        if not asked.streaming:
            found = [Path(file["filename"]) for file in self._rows.cache_files]
        self.files = tuple(path for path in found if path.is_file())
        self.version = str(self._builder.hash or "")
        if any("://" in place for place in places):
            states = [getattr(files, "origin_metadata", None) for files in origins.values()]
            self.version += f" {states}"
        self.origin = None if found_commit is None else f"{self._name} at commit {found_commit}"

    def read(self, wanted: Callable[[str], bool] | None, users: "UserPool | None" = None) -> Table:
        """Read the table.

        Args:
            wanted: Whether a column is needed; None: all are. A stream keeps no others.
            users: The users whose rows a stream keeps; None: all rows.

        Raises:
            DataError: The rows cannot be loaded.
        """
        asked, limit = self._asked, self._asked.max_rows
        if not asked.streaming:
            rows = self._rows
            kept = len(rows) if limit is None else min(limit, len(rows))
            table = dataset_table(rows.select(range(kept)), self._name)
        else:
            table = self._tried(lambda: _streamed(self._rows, (self._name, limit), wanted, users))
        told = () if limit is None else (f"{self._name}: at most {limit:,} rows are read",)
        read = () if self.origin is None else (f"read from {self.origin}",)
        return replace(table, notes=(*read, *self._notes, *told, *table.notes))

    def _found_commit(self, wanted: str | None) -> str | None:
        """The commit that was found; None for files elsewhere."""
        found = self._builder.hash or ""
        if not _COMMIT.fullmatch(found):
            return None
        if wanted not in (None, found):
            # `datasets` takes any version that is in its cache where it cannot fetch a file.
            raise DataError(
                f"{self._name}: {wanted} could not be fetched, and the cache has commit {found} "
                f"instead; try again with a network, or set {self._key}.revision: {found}"
            )
        return found

    def _split(self) -> tuple[Any, tuple[str, ...]]:
        builder, split = self._builder, self._asked.split
        if self._asked.streaming:
            rows = self._tried(lambda: builder.as_streaming_dataset(split=split))
        else:
            self._tried(builder.download_and_prepare)
            rows = self._tried(lambda: builder.as_dataset(split=split))
        return one_split(rows, self._name, f"set {self._key}.split")

    def _tried(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except DataError:
            raise
        except Exception as error:  # the Hub, the network and each builder have their own
            raise DataError(_refusal(self._asked, self._key, error)) from error


class UserPool:
    """A random sample of the users of a stream, drawn while it is read.

    Those of the smallest hashes stay. A user who leaves never comes back, so that every user who
    stays has all rows.

    Args:
        size: Users to keep.
        seed: Another seed draws other users.
        column: Gives the column of users, from the first rows.
    """

    def __init__(self, size: int, seed: int, column: Callable[[Table], str | None]) -> None:
        self.column = column
        self._size, self._seed = _POOL * size, seed
        self._heap: list[tuple[int, str]] = []
        self._kept: set[str] = set()

    def __contains__(self, user: str) -> bool:
        """Whether the rows of a user are kept."""
        return user in self._kept

    def meet(self, users: Collection[str]) -> None:
        """Take users of the stream into account."""
        for user in dict.fromkeys(users):
            if user in self._kept:
                continue
            digest = hashlib.blake2b(f"{self._seed}:{user}".encode(), digest_size=8).digest()
            heapq.heappush(self._heap, (-int.from_bytes(digest), user))
            self._kept.add(user)
            if len(self._kept) > self._size:
                self._kept.discard(heapq.heappop(self._heap)[1])


def needs(names: Collection[str]) -> Callable[[str], bool]:
    """Whether a column may have a role, by the names that the config gives or by a usual one."""
    return lambda name: name in names or untyped(name) in names or is_usual(untyped(name))


def one_split(dataset: Any, name: str, remedy: str) -> tuple[Any, tuple[str, ...]]:
    """The split ``train``, or the only one; the note names the splits that are not read.

    Raises:
        DataError: There are several, and none is ``train``.
    """
    if not isinstance(dataset, dict):
        return dataset, ()
    split = next(iter(dataset)) if len(dataset) == 1 else "train"
    if split not in dataset:
        raise DataError(
            f"{name} has the splits {', '.join(dataset)} and no split 'train'; {remedy}"
        )
    others = [other for other in dataset if other != split]
    note = f"{name}: only the split {split!r} is read, not {', '.join(others)}"
    return dataset[split], (note,) if others else ()


def dataset_table(rows: Any, name: str) -> Table:
    """A `datasets.Dataset` as a table."""
    return from_schema(
        name,
        rows.features.arrow_schema,
        len(rows),
        lambda column: rows.select_columns([column]).with_format("arrow")[:].column(0),
    )


def _streamed(
    rows: Any,
    asked: tuple[str, int | None],
    wanted: Callable[[str], bool] | None,
    users: UserPool | None,
) -> Table:
    """The wanted columns of a stream; of the others, the rows of the first batch.

    Args:
        rows: The stream.
        asked: Its name in messages, and how many rows are read at most.
        wanted: See `HubTable.read`.
        users: See `HubTable.read`.
    """
    name, limit = asked
    kept: list[pa.Table] = []
    head, user, num_rows, most = None, None, 0, 2 * _BATCH
    for batch in _batches(rows, limit):
        if head is None:
            head = from_arrow(name, batch)
            user = users.column(head) if users is not None else None
        places = pa.array(range(num_rows + 1, num_rows + batch.num_rows + 1), pa.int64())
        num_rows += batch.num_rows
        names = [c for c in batch.column_names if wanted is None or wanted(c)]
        kept.append(batch.select(names).append_column(_PLACE, places))
        if users is not None and user is not None:
            users.meet(from_arrow(name, batch.select([user])).columns[user])
            if sum(map(len, kept)) > most:
                kept = _of_users(kept, users, user)
                most = 2 * max(_BATCH, sum(map(len, kept)))
    if head is None:
        raise DataError(f"{name}: the stream has no rows; check data.hub.split")
    if users is not None and user is not None:
        kept = _of_users(kept, users, user)
    return _joined(kept, head, num_rows)


def _batches(rows: Any, limit: int | None) -> Iterator[pa.Table]:
    stream = rows if limit is None else rows.take(limit)
    yield from stream.with_format("arrow").iter(batch_size=_BATCH)


def _of_users(kept: Sequence[pa.Table], users: UserPool, user: str) -> list[pa.Table]:
    texts = (from_arrow("", table.select([user])).columns[user] for table in kept)
    masks = [pa.array([text in users for text in own], pa.bool_()) for own in texts]
    return [table.filter(mask) for table, mask in zip(kept, masks, strict=True)]


def _joined(kept: Sequence[pa.Table], head: Table, num_rows: int) -> Table:
    try:
        whole = pa.concat_tables(kept, promote_options="permissive")
    except pa.ArrowException:  # texts among numbers, of which the first batches had none
        texts = pa.schema([(n, pa.string()) for n in kept[0].column_names[:-1]])
        whole = pa.concat_tables([t.cast(texts.append(t.schema.field(_PLACE))) for t in kept])
    places = whole.column(_PLACE).to_pylist()
    table = from_arrow(head.name, whole.drop_columns([_PLACE]))
    notes = [f"{head.name}: {num_rows:,} rows were streamed"]
    if len(places) < num_rows:
        notes.append(f"{head.name}: {len(places):,} rows are of users that data.max_users may draw")
    return replace(
        table,
        header=head.header,
        columns=LazyColumns(
            [*head.columns], lambda name: (table if name in table.header else head).columns[name]
        ),
        positions=places,
        notes=tuple(notes),
    )


def _plain(files: Any) -> Any:
    """The setting ``files`` in the types that `datasets` knows."""
    if isinstance(files, dict):
        return {split: _plain(own) for split, own in files.items()}
    return list(files) if isinstance(files, tuple) else files


def _commit(asked: HubTableConfig) -> str | None:
    """The commit of a revision; None for local files, and where the Hub cannot be asked."""
    name = asked.name
    if name in BUILDERS or "://" in name or Path(name).exists():
        return None
    try:
        return HfApi().dataset_info(name, revision=asked.revision, timeout=_PATIENCE).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):  # a gated one is of the first kind
        raise
    except (OSError, HfHubHTTPError, httpx2.HTTPError, ValueError):
        return None  # `datasets` says why, or finds the data set in its cache


def _refusal(asked: HubTableConfig, key: str, error: Exception) -> str:
    """What is wrong, and the remedy."""
    told = " ".join(str(error).split()).rstrip(".")
    if (part := _missing_part(asked, key, error, told)) is not None:
        return part
    where = f"{key}.name: {asked.name!r}"
    if isinstance(error, GatedRepoError) or "gated dataset" in told:
        return f"{where} is gated; ask for access on its page, and log in with hf auth login"
    if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
        return (
            f"{where} is no data set of the Hub, or a private one; check the id, or log in with "
            "hf auth login"
        )
    remedy = "see whether datasets.load_dataset can load it"
    if isinstance(error, FileNotFoundError):
        remedy = "check the names of the files"
        where = where if not asked.files else f"{key}.files: {asked.files!r}"
    elif isinstance(error, OSError):
        remedy = _OFFLINE
    told = told if len(told) <= _LONGEST else f"{told[:_LONGEST]} …"
    return f"{where}: {type(error).__name__}: {told}; {remedy}"


def _missing_part(asked: HubTableConfig, key: str, error: Exception, told: str) -> str | None:
    """The refusal of a part that a data set lacks, with those that it has; None if it is another.

    Args:
        asked: What was asked for.
        key: Its place in a config.
        error: The error of a library.
        told: Its message on one line.
    """
    name, offered = asked.name, _offered(told)
    if isinstance(error, RevisionNotFoundError) or told.startswith("Revision '"):
        refs = _refs(name)
        return f"{key}.revision: {name} has no {asked.revision!r}; set it to {refs} a commit"
    if "Config name is missing" in told:
        return f"{key}.config: {name} has several configurations; set it to one of: {offered}"
    if "BuilderConfig" in told:
        return f"{key}.config: {name} has no {asked.config!r}; set it to one of: {offered}"
    if "configs in the cache" in told:
        return (
            f"{key}.config: the Hub cannot be reached, and the cache has no {asked.config!r} of "
            f"{name}; set it to one of: {offered}; or connect"
        )
    if "nknown split" not in told and "Bad split" not in told:
        return None
    if asked.streaming and "[" in (asked.split or ""):
        return (
            f"{key}.split: a stream has no slice {asked.split!r}; set it to one of: {offered}; and "
            f"limit {key}.max_rows, or set {key}.streaming: false"
        )
    return f"{key}.split: {name} has no {asked.split!r}; set it to one of: {offered}"


def _offered(text: str) -> str:
    """The last list of names in a message, in words."""
    for found in reversed(_LIST.findall(text)):
        try:
            return ", ".join(map(str, ast.literal_eval(found)))
        except (ValueError, SyntaxError):
            continue
    return "those on its page"


def _refs(name: str) -> str:
    """The branches and tags of a data set, before "a commit" in a message."""
    try:
        refs = HfApi().list_repo_refs(name, repo_type="dataset")
    except Exception:  # it is a hint alone
        return "a branch, a tag or"
    return f"one of: {', '.join(ref.name for ref in (*refs.branches, *refs.tags))}; or to"
