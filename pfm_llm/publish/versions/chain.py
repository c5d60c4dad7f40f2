"""The check of a repository's versions, each of which must follow the one before it.

A manifest holds the hash of every file and the hash of the previous version's manifest. A signature
is over the manifest. A changed, missing or inserted version therefore breaks a link. Only the
signer can avoid this or, without signatures, anybody who can write to the repository and makes all
later versions anew.
"""

import re
from dataclasses import dataclass

from pfm_llm.base.errors import ArtefactError, HubError, StorageError
from pfm_llm.publish import hub, signing
from pfm_llm.publish.artefact import MANIFEST_FILE
from pfm_llm.publish.manifest import Parent
from pfm_llm.publish.versions.history import Version, list_versions

_OID = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class CheckedVersion:
    """A version and the results of its checks.

    Attributes:
        version: The version.
        problems: The failed checks; empty if all passed.
        notes: The checks that could not be made.
    """

    version: Version
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ChainReport:
    """The checks of all versions of a branch.

    Attributes:
        repo: ``user/name``.
        revision: The revision at which the chain starts.
        trusted_key: The public key that must have signed all versions; None: any or none.
        versions: Newest first.
    """

    repo: str
    revision: str
    trusted_key: str | None
    versions: tuple[CheckedVersion, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """All failed checks, each with its commit."""
        return tuple(
            f"{checked.version.commit[:12]}: {problem}"
            for checked in self.versions
            for problem in checked.problems
        )

    @property
    def is_whole(self) -> bool:
        """Whether no check failed."""
        return not self.problems


def verify_chain(
    repo: str, revision: str | None = None, trusted_key: str | None = None
) -> ChainReport:
    """Check the files, the signature and the parents of every version of a branch.

    Args:
        repo: ``user/name``.
        revision: Branch, tag or commit to go back from; None: the main branch.
        trusted_key: The public key that every version must be signed with; None accepts any,
            and versions that are not signed.

    Raises:
        ArtefactError: There is no version at all, or the trusted key is no key.
        HubError: The Hub refused, or cannot be reached.
    """
    if trusted_key is not None:
        signing.check_public_key(trusted_key)
    versions = list_versions(repo, revision)
    if not versions:
        raise ArtefactError(
            f"{repo} has no {MANIFEST_FILE} at {revision or 'main'}: no shared adapter was "
            "published there with pfm_llm"
        )
    checked = []
    for place, version in enumerate(versions):
        problems, notes = [], []
        if version.manifest is not None:
            try:
                hub.pull(repo, version.commit)
            except (ArtefactError, StorageError) as error:
                problems.append(str(error))
        problems += _signature_problems(version, trusted_key)
        problems += _link_problems(version, versions[place + 1 :])
        for parent in version.parents:
            if parent.relation == "trained_from":
                problem, note = _check_origin(parent)
                problems += problem
                notes += note
        checked.append(CheckedVersion(version, tuple(problems), tuple(notes)))
    return ChainReport(repo, revision or "main", trusted_key, tuple(checked))


def _signature_problems(version: Version, trusted_key: str | None) -> list[str]:
    if version.problem:
        return [version.problem]
    if trusted_key is None or signing.same_key(version.signed_by, trusted_key):
        return []
    if version.signed_by is None:
        return [f"it is not signed, and was to be with the key {trusted_key}"]
    return [f"it is signed with the key {version.signed_by}, not with the trusted {trusted_key}"]


def _link_problems(version: Version, older: list[Version]) -> list[str]:
    """Problems with the links to earlier versions, newest first."""
    if version.manifest is None or (older and version.manifest_sha256 == older[0].manifest_sha256):
        return []  # unreadable; or the card alone was edited
    problems = []
    known = {other.commit: other for other in older}
    previous = [parent for parent in version.parents if parent.relation == "previous"]
    if older and not previous:
        problems.append(f"it does not name the version before it, {older[0].commit[:12]}")
    for parent in version.parents:
        if parent.relation == "trained_from":
            continue
        there = known.get(parent.revision or "")
        named = f"the {parent.relation} version {_short(parent)}"
        if there is None and (parent.revision or not older):
            problems.append(f"{named} is not in the history, which was cut or rewritten")
        elif there is not None and there.manifest_sha256 != parent.manifest_sha256:
            problems.append(
                f"{named} has another manifest than it says: SHA-256 {there.manifest_sha256}, not "
                f"{parent.manifest_sha256}"
            )
        elif parent.relation == "previous" and parent.manifest_sha256 != older[0].manifest_sha256:
            problems.append(
                f"it follows {named}, but {older[0].commit[:12]} stands before it in the history"
            )
        elif (
            there is not None
            and parent.relation == "restored"
            and there.manifest is not None
            and there.manifest.files != version.manifest.files
        ):
            problems.append(f"it says that it restores {there.commit[:12]}, but has other files")
    return problems


def _check_origin(parent: Parent) -> tuple[list[str], list[str]]:
    """Problems and notes about the adapter that a training started from."""
    origin = f"the adapter that it was trained from, {parent.repo} {_short(parent)}"
    try:
        hub.check_repo_id(parent.repo)
    except HubError:
        return [], [f"{origin}, was a local folder: not checked"]
    try:
        found = hub.head_manifest(parent.repo, parent.revision)
    except (HubError, StorageError) as error:
        return [], [f"{origin}: not checked ({error})"]
    if found is None:
        return [], [f"{origin}: not checked (there is no such repository to see, or no manifest)"]
    if found[1] == parent.manifest_sha256:
        return [], []
    if parent.revision and _OID.fullmatch(parent.revision):
        return [f"{origin}, has another manifest than it says: SHA-256 {found[1]}"], []
    return [], [f"{origin}: not checked (that revision has moved on since)"]


def _short(parent: Parent) -> str:
    return (parent.revision or parent.manifest_sha256)[:12]
