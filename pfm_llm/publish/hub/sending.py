"""Publishing a folder: one commit after which the Hub holds exactly these files."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils.sha import git_hash

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, HubError
from pfm_llm.publish.artefact import MANIFEST_FILE, is_listed, read_artefact
from pfm_llm.publish.hub.calls import (
    PUSHING,
    WAITS,
    check_repo_id,
    hub_api,
    hub_errors,
    is_passing,
    pause,
    retried,
    status_of,
)
from pfm_llm.publish.hub.reading import MANAGED_FILES, check_complete, read_file
from pfm_llm.publish.manifest import Manifest

_Operations = list[CommitOperationAdd | CommitOperationDelete]
_OID = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Pushed:
    """The place of a pushed folder.

    Attributes:
        repo: ``user/name``.
        revision: The commit.
        url: Its page.
        changed: False if the head already held exactly this folder, so no commit was made.
    """

    repo: str
    revision: str
    url: str
    changed: bool


@dataclass(frozen=True)
class _Content:
    """A local file, as the Hub would describe it."""

    path: Path
    size: int
    sha256: str
    git_oid: str

    def is_in(self, there: RepoFile | None) -> bool:
        """Whether the Hub has this content there."""
        if there is None or there.size != self.size:
            return False
        return (there.lfs.sha256 == self.sha256) if there.lfs else (there.blob_id == self.git_oid)


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    tag: str | None = None,
    revision: str = "main",
    message: str,
) -> Pushed:
    """Publish a folder in one commit, after which the branch's head holds exactly its files.

    Files of a shared adapter that the repository has and the folder lacks are deleted. Other files,
    such as ``.gitattributes``, stay. A second push of the same folder changes nothing. After a
    broken connection, the next push sends only the missing files.

    Args:
        folder: A shared adapter's folder; all of its files are published.
        repo: ``user/name``; created if it does not exist.
        private: Whether a new repository is private; an existing one is not changed.
        tag: A tag for the commit.
        revision: The branch; a new one starts from the main branch.
        message: Of the commit.

    Raises:
        ArtefactError: The folder is no shared adapter's, or holds a file that does not belong in
            one; nothing was sent.
        CorruptFileError: A file does not match the manifest; nothing was sent.
        HubError: The Hub refused or cannot be reached, the tag names another commit, or somebody
            else pushed in the meantime.
    """
    check_repo_id(repo)
    contents = _contents(folder)
    artefact = read_artefact(folder)
    check_complete(artefact, contents)
    with hub_errors(repo, PUSHING):
        refs = _refs_of_repo(repo, private)
        head = _ensure_branch(repo, revision, refs)
        operations = _operations(contents, _tree(repo, head))
        _check_tag(repo, tag, refs, None if operations else head)
        commit = head
        if operations:
            _check_previous(artefact.manifest, repo, head)
            commit = _commit(repo, revision, contents, operations, head, message)
        if tag is not None:
            _ensure_tag(repo, tag, commit)
    url = f"{hub_api().endpoint}/{repo}/tree/{commit}"
    return Pushed(repo, commit, url, commit != head)


def _contents(folder: Path) -> dict[str, _Content]:
    """Path in the repository to file."""
    found = {}
    with files.storage_errors(folder):
        for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            name = path.relative_to(folder).as_posix()
            if not is_listed(name, MANAGED_FILES):
                raise ArtefactError(
                    f"{path} has no place in a shared adapter's folder: nothing was sent; "
                    "push a folder that holds the adapter alone"
                )
            content = path.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            found[name] = _Content(path, len(content), sha256, git_hash(content))
    return found


def _refs_of_repo(repo: str, private: bool) -> GitRefs:
    """Branches and tags; of a new repository, where there was none."""
    api = hub_api()
    try:
        return retried(lambda: api.list_repo_refs(repo))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        retried(lambda: api.create_repo(repo, private=private, exist_ok=True))
    return retried(lambda: api.list_repo_refs(repo))


def _ensure_branch(repo: str, revision: str, refs: GitRefs) -> str:
    """The commit that the branch names."""
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    if revision in branches:
        return branches[revision]
    if _OID.fullmatch(revision) or any(tag.name == revision for tag in refs.tags):
        raise HubError(
            f"cannot push to {repo} at {revision}: only a branch can take a push, and this is a "
            "tag or a commit; name a branch"
        )
    api = hub_api()
    retried(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    return _head(repo, revision)


def _head(repo: str, revision: str) -> str:
    refs = retried(lambda: hub_api().list_repo_refs(repo))
    for branch in refs.branches:
        if branch.name == revision:
            return branch.target_commit
    raise HubError(f"cannot push to {repo}: its branch {revision} was deleted meanwhile; run again")


def _tree(repo: str, commit: str) -> dict[str, RepoFile]:
    entries = hub_api().list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _operations(contents: dict[str, _Content], there: dict[str, RepoFile]) -> _Operations:
    """The operations that make the repository's files equal to those of the folder."""
    changes: _Operations = [
        CommitOperationAdd(name, str(content.path))
        for name, content in contents.items()
        if not content.is_in(there.get(name))
    ]
    managed = [name for name in sorted(there) if is_listed(name, MANAGED_FILES)]
    gone = [name for name in managed if name not in contents]
    return changes + [CommitOperationDelete(name, is_folder=False) for name in gone]


def _check_tag(repo: str, tag: str | None, refs: GitRefs, commit: str | None) -> None:
    """Refuse a tag that names another commit than this one; None stands for a new one."""
    there = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if tag is not None and there is not None and there != commit:
        raise _tag_conflict(repo, tag, there, commit)


def _check_previous(manifest: Manifest, repo: str, head: str) -> None:
    """Refuse a manifest that names another version than the head as the one before it."""
    for parent in manifest.parents:
        if parent.relation != "previous" or parent.repo != repo or parent.revision == head:
            continue
        there = read_file(repo, head, MANIFEST_FILE)
        # The card alone may have been edited since.
        if there is None or hashlib.sha256(there).hexdigest() != parent.manifest_sha256:
            raise _overtaken(repo, parent.revision or parent.manifest_sha256, head)


def _commit(
    repo: str,
    revision: str,
    contents: dict[str, _Content],
    operations: _Operations,
    head: str,
    message: str,
) -> str:
    """Upload the missing files and commit; return the commit."""
    api = hub_api()
    added = [change for change in operations if isinstance(change, CommitOperationAdd)]
    # By itself first: the client tries uploads again, but not the commit.
    api.preupload_lfs_files(repo, added, revision=revision, free_memory=False)
    for wait in (*WAITS, None):
        try:
            made = api.create_commit(
                repo, operations, commit_message=message, revision=revision, parent_commit=head
            ).oid
            break
        except Exception as error:
            if not is_passing(error) and status_of(error) != 412:
                raise
            now = _head(repo, revision)
            if now != head:
                # It may be this very commit, whose answer was lost.
                if _operations(contents, _tree(repo, now)):
                    raise _overtaken(repo, head, now) from error
                return now
            if wait is None:
                raise
            pause(error, wait)
    _check_whole(repo, contents, made)
    return made


def _check_whole(repo: str, contents: dict[str, _Content], commit: str) -> None:
    wrong = _operations(contents, _tree(repo, commit))
    if wrong:
        names = ", ".join(change.path_in_repo for change in wrong)
        raise HubError(
            f"pushed to {repo} as {commit[:12]}, but the Hub does not hold {names} as it is in the "
            "folder: delete a .gitignore that the repository may have, leave the folder alone "
            "while it is pushed, and push again"
        )


def _ensure_tag(repo: str, tag: str, commit: str) -> None:
    api = hub_api()
    try:
        retried(lambda: api.create_tag(repo, tag=tag, revision=commit))
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        tags = retried(lambda: api.list_repo_refs(repo)).tags
        there = next((ref.target_commit for ref in tags if ref.name == tag), None)
        if there != commit:
            raise _tag_conflict(repo, tag, there or "(unknown)", commit) from error


def _tag_conflict(repo: str, tag: str, there: str, wanted: str | None) -> HubError:
    where = f"commit {wanted[:12]}" if wanted else "a new commit"
    return HubError(
        f"cannot push to {repo}: the tag {tag} is on commit {there[:12]} already, and was to be on "
        f"{where}; choose another tag, or delete it first (`hf repo tag delete {repo} {tag}`)"
    )


def _overtaken(repo: str, before: str, now: str) -> HubError:
    return HubError(
        f"cannot push to {repo}: its head was {before[:12]} when this push was prepared and is "
        f"{now[:12]} now, so somebody else has pushed; look at it with "
        f"`pfm versions list {repo}`, and run again to push on top of it"
    )
