"""The versions of a repository: every commit with a manifest."""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime

from pfm_llm.base.errors import ArtefactError, CorruptFileError, HubError
from pfm_llm.config.cut_offs import headline_k
from pfm_llm.protocol.types import Mode
from pfm_llm.publish import hub, signing
from pfm_llm.publish.artefact import MANIFEST_FILE, SIGNATURE_FILE
from pfm_llm.publish.manifest import Manifest, Metric, Parent

_NDCG = "ndcg@"
_PREFIX = re.compile("[0-9a-f]{4,40}")
_OID_DIGITS = 40


@dataclass(frozen=True)
class Version:
    """A commit that has a manifest.

    Attributes:
        commit: 40 hexadecimal digits.
        date: When it was pushed.
        title: First line of the commit's message.
        tags: The tags on the commit.
        manifest_sha256: Identity of the adapter; a commit that edits only the card keeps it.
        manifest: The manifest; None if it cannot be read.
        signed_by: The public key of a valid signature; None without one.
        problem: The problem with the manifest or the signature; empty if there is none.
    """

    commit: str
    date: datetime
    title: str
    tags: tuple[str, ...]
    manifest_sha256: str
    manifest: Manifest | None
    signed_by: str | None
    problem: str

    @property
    def name(self) -> str:
        """Name of the run; empty if the manifest cannot be read."""
        return self.manifest.name if self.manifest else ""

    @property
    def round(self) -> int | None:
        """The last round of the adapter's training; None if the manifest cannot be read."""
        return self.manifest.round if self.manifest else None

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The predecessors of the adapter."""
        return self.manifest.parents if self.manifest else ()

    @property
    def headline(self) -> Metric | None:
        """NDCG of the shared adapter alone at `headline_k`; None before an evaluation."""
        found = {
            metric.metric: metric
            for metric in (self.manifest.metrics if self.manifest else ())
            if metric.mode == Mode.SHARED_ONLY
        }
        cut_offs = [name.removeprefix(_NDCG) for name in found if name.startswith(_NDCG)]
        k = headline_k([int(text) for text in cut_offs if text.isdecimal()])
        return found.get(f"{_NDCG}{k}")


def list_versions(repo: str, revision: str | None = None) -> list[Version]:
    """The versions of a branch, newest first.

    A manifest or signature that is damaged does not hide the others: see `Version.problem`.

    Args:
        repo: ``user/name``.
        revision: Branch, tag or commit to go back from; None: the main branch.

    Raises:
        HubError: The Hub refused, or cannot be reached.
    """
    tags = hub.list_tags(repo)
    commits = hub.list_commits(repo, revision)
    versions = [_read_version(repo, commit, tags) for commit in commits]
    return [version for version in versions if version is not None]


def find_commit(repo: str, wanted: str, revision: str | None = None) -> str:
    """Find a commit by a tag, its hash or a unique start of its hash.

    Args:
        repo: ``user/name``.
        wanted: The tag, hash or start of a hash.
        revision: The branch whose history is searched for the start of a hash.

    Raises:
        HubError: No commit or several fit, the Hub refused, or it cannot be reached.
    """
    tags = hub.list_tags(repo)
    if wanted in tags:
        return tags[wanted]
    lowered = wanted.lower()
    if not _PREFIX.fullmatch(lowered):
        raise HubError(
            f"{repo} has no tag {wanted!r}, and it is no commit (4 to 40 hexadecimal digits); "
            f"`pfm versions list {repo}` shows what there is"
        )
    known = {*tags.values(), *(commit.commit_id for commit in hub.list_commits(repo, revision))}
    found = sorted(oid for oid in known if oid.startswith(lowered))
    if len(found) == 1:
        return found[0]
    if found:
        raise HubError(f"{wanted} may be {' or '.join(found)} in {repo}: write more of it")
    if len(lowered) == _OID_DIGITS:
        return lowered  # of another branch; the Hub knows
    raise HubError(f"{repo} has no commit {wanted}; `pfm versions list {repo}` shows what there is")


def _read_version(repo: str, commit: hub.GitCommitInfo, tags: dict[str, str]) -> Version | None:
    origin = f"{repo}@{commit.commit_id[:12]}"
    content, manifest, signed_by, problems = None, None, None, []
    try:
        content = hub.read_file(repo, commit.commit_id, MANIFEST_FILE)
        if content is None:
            return None
        manifest = Manifest.from_bytes(content, f"{origin}: {MANIFEST_FILE}")
    except CorruptFileError as error:
        problems.append(str(error))
    try:
        signature = hub.read_file(repo, commit.commit_id, SIGNATURE_FILE)
        if signature is not None and content is not None:
            signed_by = signing.verify(content, signature, None)
    except (ArtefactError, CorruptFileError) as error:
        problems.append(str(error))
    return Version(
        commit=commit.commit_id,
        date=commit.created_at,
        title=commit.title,
        tags=tuple(sorted(tag for tag, oid in tags.items() if oid == commit.commit_id)),
        manifest_sha256=hashlib.sha256(content).hexdigest() if content else "",
        manifest=manifest,
        signed_by=signed_by,
        problem="; ".join(problems),
    )
