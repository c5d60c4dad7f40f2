"""What the tests of publishing share: small versions of an adapter, pushed to the double."""

import shutil
from pathlib import Path

import pytest

from pfm_llm.publish import hub as the_hub
from pfm_llm.publish import signing
from pfm_llm.publish.artefact import Artefact
from pfm_llm.publish.manifest import Parent
from tests.support.hub_double import OWNER, WRITE_TOKEN, HubDouble
from tests.support.pushes import api, without_the_hubs
from tests.support.small_artefacts import follows, make_artefact

REPO = f"{OWNER}/small"
LARGE = ["adapter_model.safetensors", "recommender_head.safetensors"]


@pytest.fixture
def logged_in(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who may write."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)


@pytest.fixture
def small(tmp_path: Path) -> Artefact:
    """What is pushed first."""
    return make_artefact(tmp_path / "pushed")


@pytest.fixture
def two(logged_in: None, small: Artefact, tmp_path: Path) -> tuple[str, str]:
    """The commits of two versions; the older one has the tag v1."""
    first = push(small, tag="v1").revision
    return first, push(upon_head(tmp_path / "second", 1)).revision


@pytest.fixture
def key(tmp_path: Path) -> signing.SigningKey:
    """The publisher's."""
    signing.new_key(tmp_path / "publisher.pem")
    return signing.load_key(tmp_path / "publisher.pem")


@pytest.fixture
def three(tmp_path: Path, key: signing.SigningKey) -> list[str]:
    """The commits of three signed versions, oldest first."""
    return [push(upon_head(tmp_path / f"v{n}", n, key), tag=f"v{n}").revision for n in range(3)]


def push(artefact: Artefact, **options: str | bool) -> the_hub.Pushed:
    """Push a folder."""
    return the_hub.push_folder(artefact.folder, REPO, message="push", **options)


def upon_head(
    folder: Path, seed: int, key: signing.SigningKey | None = None, revision: str | None = None
) -> Artefact:
    """The next version."""
    shutil.rmtree(folder, ignore_errors=True)
    parents = follows(REPO, the_hub.head_manifest(REPO, revision))
    return make_artefact(folder, seed, key=key, parents=parents)


def stored(hub: HubDouble, revision: str = "main") -> dict[str, bytes]:
    """Path to content of the repo, but for what the Hub itself adds."""
    return without_the_hubs(hub.repo(REPO).files(revision))


def num_commits(hub: HubDouble) -> int:
    """But for the one that the Hub itself makes."""
    return len(hub.repo(REPO).commits) - 1


def put(hub: HubDouble, name: str, content: bytes) -> str:
    """Change a file of the repo by hand; the commit."""
    return api(hub).upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=name).oid


def delete(hub: HubDouble, name: str) -> str:
    """Delete a file of the repo by hand; the commit."""
    return api(hub).delete_file(name, REPO).oid


def trained_from(folder: Path, repo: str, sha256: str, revision: str | None) -> Artefact:
    """A version whose training started from another adapter."""
    parent = Parent(relation="trained_from", manifest_sha256=sha256, repo=repo, revision=revision)
    return make_artefact(folder, 5, parents=(parent,))
