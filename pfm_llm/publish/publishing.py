"""Publishing a shared adapter: it is checked (`staging`), linked to its parents, signed and pushed.

A copy is pushed; the exported folder is not changed.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pfm_llm.base import files
from pfm_llm.publish import hub, signing
from pfm_llm.publish.artefact import CARD_FILE, MANIFEST_FILE, SIGNATURE_FILE, Artefact
from pfm_llm.publish.card import addressed_card
from pfm_llm.publish.manifest import Manifest, Parent
from pfm_llm.publish.staging import stage


@dataclass(frozen=True)
class PublishRequest:
    """The folder to publish, and the place to publish it.

    Attributes:
        exported: The folder of the exported adapter; it is not touched.
        private_root: The private store whose tensors must not be in it; None without private part.
        repo: ``user/name``.
        private: Make the repository private when it is created.
        tag: For this version.
        revision: Branch.
        signing_key: PEM file; None: not signed.
    """

    exported: Path
    private_root: Path | None
    repo: str
    private: bool = True
    tag: str | None = None
    revision: str = "main"
    signing_key: Path | None = None


@dataclass(frozen=True)
class PlannedFile:
    """A file that would be pushed.

    Attributes:
        name: Path in the repository.
        size: In bytes.
        sha256: Of its content.
    """

    name: str
    size: int
    sha256: str


def plan(request: PublishRequest) -> list[PlannedFile]:
    """The files that `publish` would push, after all of its checks; needs no network or token.

    The pushed manifest will also name the previous version, which only the Hub knows.

    Raises:
        PfmError: See `publish`; without the errors of the Hub.
    """
    hub.check_repo_id(request.repo)
    with tempfile.TemporaryDirectory() as scratch:
        staged = stage(request.exported, Path(scratch) / "staged", request.private_root)
        _finish(staged.folder, staged.manifest, request)
        paths = sorted(path for path in staged.folder.rglob("*") if path.is_file())
        return [
            PlannedFile(
                path.relative_to(staged.folder).as_posix(),
                path.stat().st_size,
                files.sha256_of(path),
            )
            for path in paths
        ]


def publish(request: PublishRequest) -> hub.Pushed:
    """Check an exported adapter and push it.

    If the branch already holds it, only a missing tag or signature is sent.

    Returns:
        The place of the branch's newest version, and whether a file was new.

    Raises:
        PrivateLeakError: A private tensor is in the folder.
        ArtefactError: The folder is no shared adapter, holds a file that does not belong in one,
            or there is no private store to compare it with.
        CorruptFileError: A file does not match the manifest, or a private state is damaged.
        StorageError: A file cannot be read or written, or the signing key cannot be used.
        HubError: The Hub refused, or cannot be reached.
    """
    hub.check_repo_id(request.repo)
    with tempfile.TemporaryDirectory() as scratch:
        staged = stage(request.exported, Path(scratch) / "staged", request.private_root)
        manifest = _placed(staged, request)
        _finish(staged.folder, manifest, request)
        return hub.push_folder(
            staged.folder,
            request.repo,
            private=request.private,
            tag=request.tag,
            revision=request.revision,
            message=f"{manifest.name}, round {manifest.round}",
        )


def _placed(staged: Artefact, request: PublishRequest) -> Manifest:
    """The manifest as the successor of the branch's newest version, or that one if it is equal."""
    manifest, repo = staged.manifest, request.repo
    head = hub.head_manifest(repo, request.revision)
    if head is None:
        return manifest
    newest, sha256, commit = head
    if newest.model_copy(update={"parents": manifest.parents}) == manifest:
        # Its card may have been edited there, and it may be signed.
        for name in (CARD_FILE, SIGNATURE_FILE):
            if (content := hub.read_file(repo, commit, name)) is not None:
                files.write_bytes(staged.folder / name, content)
        return newest
    trained_from = [parent for parent in manifest.parents if parent.relation == "trained_from"]
    previous = Parent(relation="previous", manifest_sha256=sha256, repo=repo, revision=commit)
    return manifest.model_copy(update={"parents": (previous, *trained_from)})


def _finish(folder: Path, manifest: Manifest, request: PublishRequest) -> None:
    """Write manifest, card and signature for the repository."""
    content = manifest.to_bytes()
    files.write_bytes(folder / MANIFEST_FILE, content)
    card = (folder / CARD_FILE).read_text()
    files.write_text(folder / CARD_FILE, addressed_card(card, request.repo))
    if request.signing_key is not None:
        signature = signing.sign(content, signing.load_key(request.signing_key))
        files.write_bytes(folder / SIGNATURE_FILE, signature)
