"""Reading from the Hub: pulling an adapter, its manifest, and the list of versions.

Before anything is fetched, the sizes that the Hub announces are compared with the largest that such
files have. The client checks only that a download has the announced size. In its cache a file is a
link to a blob, whose name is the hash that the Hub announced. This module compares the content with
that name and deletes damaged files, which the client would otherwise use again.
"""

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import GitCommitInfo, RepoFile
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CorruptFileError, HubError
from pfm_llm.publish.artefact import (
    CARD_FILE,
    LISTED_FILES,
    MANIFEST_FILE,
    PLOT_FILES,
    SIGNATURE_FILE,
    Artefact,
    is_listed,
    read_artefact,
    size_limit,
)
from pfm_llm.publish.foreign import ForeignFolder
from pfm_llm.publish.hub.calls import (
    UNREACHABLE,
    check_repo_id,
    hub_api,
    hub_errors,
    is_cut,
    retried,
)
from pfm_llm.publish.manifest import Manifest

MANAGED_FILES = (*LISTED_FILES, MANIFEST_FILE, SIGNATURE_FILE, CARD_FILE)
"""Patterns of the files that are pushed and pulled; other files of a repository are ignored."""

_SHA256_DIGITS, _GIT_DIGITS = 64, 40
_MAX_FILES = 256


def pull(source: str, revision: str | None = None) -> Artefact:
    """Get a shared adapter and check all of its files.

    Without a connection, the copy of an earlier pull of this revision is used.

    Args:
        source: A folder on this machine, or ``user/name`` on the Hub.
        revision: Commit, tag or branch on the Hub; None: the head of its main branch.

    Raises:
        ArtefactError: It is not a shared adapter's folder, or a revision of a local folder.
        CorruptFileError: A file is damaged; it is deleted from the client's cache. Or the Hub holds
            a larger one than such a file is, or too many; nothing is fetched then.
        HubError: The Hub refused, or cannot be reached.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ArtefactError(
                f"{source} is a folder on this machine and has no revision {revision}: leave the "
                "revision out, or run where there is no such folder to have it from the Hub"
            )
        return read_artefact(Path(source))
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise HubError(f"{source} is neither a folder here nor a repository (user/name) on the Hub")
    check_repo_id(source)
    with hub_errors(source, "pull"):
        api = hub_api()
        commit = retried(lambda: api.resolve_revision(source, revision=revision).resolved)
        wanted = _names_to_fetch(source, commit)
        got = retried(
            lambda: api.snapshot_download(source, revision=commit, allow_patterns=wanted), is_cut
        )
    return _checked(Path(got), f"{source}@{commit[:12]}")


def pull_named(text: str) -> Artefact:
    """`pull` from one text: a folder, ``user/name`` or ``user/name@revision``.

    Raises:
        ArtefactError: It is not a shared adapter's folder.
        CorruptFileError: A file is damaged; it is deleted from the client's cache.
        HubError: The Hub refused, or cannot be reached.
    """
    source, _, revision = text.partition("@")
    return pull(text) if Path(text).is_dir() else pull(source, revision or None)


def read_file(repo: str, revision: str, name: str) -> bytes | None:
    """A small file of a commit.

    Args:
        repo: ``user/name``.
        revision: Which commit, tag or branch.
        name: Path of the file.

    Returns:
        Its content; None when there is no such file there.

    Raises:
        CorruptFileError: It is damaged, and deleted from the client's cache; or larger than such a
            file is.
        HubError: The Hub refused, or cannot be reached.
    """
    check_repo_id(repo)
    with hub_errors(repo, "read"):
        try:
            fetch = hub_api().hf_hub_download
            found = retried(lambda: fetch(repo, name, revision=revision, dry_run=True))
            _check_size(f"{repo}@{revision[:12]}", name, found.file_size or 0)
            got = retried(lambda: fetch(repo, name, revision=revision), is_cut)
        except RemoteEntryNotFoundError:
            return None
    _check_downloads([Path(got)], f"{repo}@{revision[:12]}")
    folder = ForeignFolder(Path(got).parent, f"{repo}@{revision[:12]}")
    return folder.read(Path(got).name, size_limit(name))


def head_manifest(repo: str, revision: str | None = None) -> tuple[Manifest, str, str] | None:
    """The manifest of the version before a push to a branch.

    Args:
        repo: ``user/name``.
        revision: The branch; one that does not exist yet would start from the main branch.

    Returns:
        The manifest, its SHA-256 and the commit; None without such a repository (or one that
        this token may see), or without a manifest in it.

    Raises:
        CorruptFileError: There is a manifest that this version cannot read.
        HubError: The Hub refused, or cannot be reached.
    """
    check_repo_id(repo)
    with hub_errors(repo, "read"):
        head = _head(repo, revision)
    content = None if head is None else read_file(repo, head, MANIFEST_FILE)
    if head is None or content is None:
        return None
    manifest = Manifest.from_bytes(content, f"{repo}@{head[:12]}: {MANIFEST_FILE}")
    return manifest, hashlib.sha256(content).hexdigest(), head


def list_commits(repo: str, revision: str | None = None) -> list[GitCommitInfo]:
    """The commits that led to a revision, newest first.

    Raises:
        HubError: The Hub refused, or cannot be reached.
    """
    check_repo_id(repo)
    with hub_errors(repo, "list the commits of"):
        return hub_api().list_repo_commits(repo, revision=revision)


def list_tags(repo: str) -> dict[str, str]:
    """Tag to commit.

    Raises:
        HubError: The Hub refused, or cannot be reached.
    """
    check_repo_id(repo)
    with hub_errors(repo, "list the tags of"):
        refs = retried(lambda: hub_api().list_repo_refs(repo))
    return {tag.name: tag.target_commit for tag in refs.tags}


def check_complete(artefact: Artefact, names: Iterable[str]) -> None:
    """Check that the manifest lists all files of a folder.

    Args:
        artefact: The artefact of the folder.
        names: The names of its files. A plot need not be listed.

    Raises:
        ArtefactError: A file is not listed.
    """
    for name in names:
        meaningful = is_listed(name) and not fnmatchcase(name, PLOT_FILES)
        if meaningful and name not in artefact.manifest.files:
            raise ArtefactError(
                f"{artefact.origin}: {name} is not in the manifest, so it was put there "
                "afterwards: remove it, or take another revision"
            )


def _head(repo: str, revision: str | None) -> str | None:
    api = hub_api()
    try:
        return retried(lambda: api.model_info(repo, revision=revision)).sha
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        return retried(lambda: api.model_info(repo)).sha


def _names_to_fetch(repo: str, commit: str) -> list[str]:
    """The files of an adapter, none of which is too large; patterns of them without a connection.

    Raises:
        CorruptFileError: They are too many, or one is too large.
    """
    origin, names = f"{repo}@{commit[:12]}", []
    try:
        for entry in hub_api().list_repo_tree(repo, recursive=True, revision=commit):
            if isinstance(entry, RepoFile) and is_listed(entry.path, MANAGED_FILES):
                _check_size(origin, entry.path, entry.size)
                names.append(entry.path)
    except (OfflineModeIsEnabled, *UNREACHABLE):  # an earlier copy may be whole
        return list(MANAGED_FILES)
    if len(names) > _MAX_FILES:
        raise CorruptFileError(
            f"{origin} holds {len(names):,} files of an adapter, more than {_MAX_FILES}, and none "
            "was fetched; pull another revision, or ask its owner"
        )
    return names


def _check_size(origin: str, name: str, size: int) -> None:
    limit = size_limit(name)
    if size > limit:
        raise CorruptFileError(
            f"{origin}: {name} has {size:,} bytes, more than the {limit:,} of such a file, and was "
            "not fetched; pull another revision, or ask its owner"
        )


def _checked(folder: Path, origin: str) -> Artefact:
    downloads = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    _check_downloads(downloads, origin)
    try:
        artefact = read_artefact(folder, origin)
    except CorruptFileError as error:
        # Where the cache holds no links, nothing says which file is the damaged one.
        _discard(path for path in downloads if not path.is_symlink())
        raise CorruptFileError(
            f"{error}. What was downloaded is what the Hub holds: if it stays so, the repository "
            "was changed after it was published; pull another revision, or ask its owner"
        ) from error
    check_complete(artefact, (path.relative_to(folder).as_posix() for path in downloads))
    return artefact


def _check_downloads(paths: Iterable[Path], origin: str) -> None:
    damaged = [path for path in paths if path.is_symlink() and not _is_whole(path)]
    if not damaged:
        return
    _discard(damaged)
    raise CorruptFileError(
        f"{origin}: {', '.join(path.name for path in damaged)} was damaged on its way or on this "
        "disk, and is deleted from the cache: run again to fetch it anew"
    )


def _is_whole(path: Path) -> bool:
    """Whether a link of the cache leads to the content that the Hub announced."""
    name = path.readlink().name
    if not path.exists():  # another commit's file with this content was damaged, and deleted
        return False
    if len(name) == _SHA256_DIGITS:
        return files.sha256_of(path) == name
    return len(name) != _GIT_DIGITS or git_hash(path.read_bytes()) == name


def _discard(paths: Iterable[Path]) -> None:
    """Delete files of the cache, and all that they are links to."""
    for path in paths:
        with files.storage_errors(path):
            while True:
                target = path.parent / path.readlink() if path.is_symlink() else None
                path.unlink(missing_ok=True)
                if target is None:
                    break
                path = target
