"""Restoring a version: into a folder, or as a new commit on top of the later versions."""

import logging
import tempfile
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError
from pfm_llm.publish import hub, signing
from pfm_llm.publish.artefact import (
    CARD_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Artefact,
    read_artefact,
    size_limit,
)
from pfm_llm.publish.manifest import Manifest, Parent
from pfm_llm.publish.versions.history import find_commit

_log = logging.getLogger(__name__)


def copy_artefact(artefact: Artefact, folder: Path) -> Artefact:
    """Copy a checked artefact: its listed files, manifest, signature and card, nothing else.

    Args:
        artefact: From `hub.pull`.
        folder: The target folder; it must be empty or must not exist.

    Raises:
        ArtefactError: The folder is not empty.
        CorruptFileError: A file is a link out of its folder, or no plain file.
        StorageError: It cannot be written.
    """
    with files.storage_errors(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise ArtefactError(f"{folder} is not empty: name another folder, or empty it")
    for name in (*artefact.manifest.files, MANIFEST_FILE, SIGNATURE_FILE, CARD_FILE):
        if artefact.files.has(name):
            files.write_bytes(folder / name, artefact.files.read(name, size_limit(name)))
    return read_artefact(folder, artefact.origin)


def rollback(
    repo: str,
    to: str,
    *,
    signing_key: signing.SigningKey | None = None,
    revision: str = "main",
) -> hub.Pushed:
    """Publish an older version anew, on top of the later ones. The history stays.

    The new manifest names the head as its previous version and the older version as the restored
    one. The older signature does not fit the new manifest: it is signed again or left unsigned.

    Args:
        repo: ``user/name``.
        to: A commit, a unique start of one, or a tag.
        signing_key: To sign with; without it the new version is not signed.
        revision: The branch.

    Raises:
        ArtefactError: That version is not a shared adapter, or its signature is wrong.
        CorruptFileError: A file of it is damaged.
        HubError: There is no such version, somebody else pushed in the meantime, or the Hub
            refused or cannot be reached.
    """
    commit = find_commit(repo, to, revision)
    old = hub.pull(repo, commit)
    signed = _check_signature(old)
    content, signature = _restored_manifest(old, repo, commit, revision)
    if signing_key is not None:
        signature = signing.sign(content, signing_key)
    if signed and signature is None:
        _log.warning(
            "%s is signed; what is restored from it is not, as its manifest is a new one "
            "(roll back with a signing key to sign it)",
            old.origin,
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_artefact(old, Path(scratch) / "adapter").folder
        files.write_bytes(folder / MANIFEST_FILE, content)
        (folder / SIGNATURE_FILE).unlink(missing_ok=True)
        if signature is not None:
            files.write_bytes(folder / SIGNATURE_FILE, signature)
        message = f"Roll back to {commit[:12]}"
        return hub.push_folder(folder, repo, revision=revision, message=message)


def _check_signature(artefact: Artefact) -> bool:
    """Whether it is signed; a wrong signature is an error."""
    if not artefact.files.has(SIGNATURE_FILE):
        return False
    content = artefact.files.read(MANIFEST_FILE, size_limit(MANIFEST_FILE))
    try:
        signing.verify(content, artefact.files.read(SIGNATURE_FILE), None)
    except ArtefactError as error:
        raise ArtefactError(f"{artefact.origin}: {error}") from error
    return True


def _restored_manifest(
    old: Artefact, repo: str, commit: str, revision: str
) -> tuple[bytes, bytes | None]:
    """The manifest of a version that restores another one, and its signature so far."""
    head = hub.head_manifest(repo, revision)
    if head is not None and _holds(head, old):
        # As it was written: another version of this library might write it differently.
        content = hub.read_file(repo, head[2], MANIFEST_FILE)
        return content or head[0].to_bytes(), hub.read_file(repo, head[2], SIGNATURE_FILE)
    parents = [p for p in old.manifest.parents if p.relation == "trained_from"]
    restored = {"manifest_sha256": old.manifest_sha256, "repo": repo, "revision": commit}
    parents.append(Parent(relation="restored", **restored))
    if head is not None:
        previous = {"manifest_sha256": head[1], "repo": repo, "revision": head[2]}
        parents.append(Parent(relation="previous", **previous))
    return old.manifest.model_copy(update={"parents": tuple(parents)}).to_bytes(), None


def _holds(head: tuple[Manifest, str, str], old: Artefact) -> bool:
    """Whether the head is this version, or was rolled back to it already."""
    manifest, sha256, _ = head
    restored = {p.manifest_sha256 for p in manifest.parents if p.relation == "restored"}
    return sha256 == old.manifest_sha256 or (
        old.manifest_sha256 in restored and manifest.files == old.manifest.files
    )
