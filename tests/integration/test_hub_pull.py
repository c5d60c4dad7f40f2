"""Pulling through the real client, and what is read before a push."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, constants

from pfm_llm.base.errors import ArtefactError, CorruptFileError, HubError, StorageError
from pfm_llm.publish import hub as the_hub
from pfm_llm.publish.artefact import BASIS_FILE, CARD_FILE, MANIFEST_FILE, Artefact, size_limit
from pfm_llm.publish.hub import calls, pull, reading
from tests.support.hub_double import OWNER, HubDouble
from tests.support.pushes import api, without_the_hubs
from tests.support.small_artefacts import contents
from tests.support.small_hub import LARGE, REPO, logged_in, push, small, two, upon_head

__all__ = ["logged_in", "small", "two"]
pytestmark = pytest.mark.usefixtures("logged_in")


# --- pulling ----------------------------------------------------------------------------------


def test_hub_versions_are_pulled_by_commit_tag_and_branch(
    hub: HubDouble, two: tuple[str, str], small: Artefact
) -> None:
    first, second = two
    api(hub).create_branch(REPO, branch="side", revision=second)
    wanted = {
        None: second, "main": second, "side": second, second: second,
        first: first, first[:8]: first, "v1": first,
    }  # fmt: skip
    for revision, commit in wanted.items():
        artefact = pull(REPO, revision)
        assert artefact.origin == f"{REPO}@{commit[:12]}"
        assert contents(artefact.folder) == without_the_hubs(hub.repo(REPO).files(commit))
        assert artefact.manifest.round == (0 if commit == first else 1)
    assert pull(REPO, "v1").manifest_sha256 == small.manifest_sha256


def test_hub_sends_only_what_belongs_to_an_adapter(hub: HubDouble, small: Artefact) -> None:
    push(small)
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"\0" * 9, path_in_repo="huge.bin")
    assert contents(pull(REPO).folder) == contents(small.folder)
    assert hub.asked("GET", "huge.bin") == []


def test_hub_files_that_are_too_large_or_too_many_are_not_fetched(
    hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(small)
    name = "training_config.yaml"
    large = b"\0" * (size_limit(name) + 1)
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=large, path_in_repo=name)
    before = len(hub.asked("GET", "/resolve/"))
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"\0", path_in_repo="plots/deep/a.png")
    with pytest.raises(CorruptFileError, match=r"config.yaml has 1,048,577 bytes.*not fetched"):
        pull(REPO)
    with pytest.raises(CorruptFileError, match=r"config.yaml has 1,048,577 bytes.*not fetched"):
        the_hub.read_file(REPO, "main", name)
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=small.folder / name, path_in_repo=name)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_MAX_FILES", 3)
        with pytest.raises(CorruptFileError, match="files of an adapter, more than 3, and none"):
            pull(REPO)
    assert len(hub.asked("GET", "/resolve/")) == before
    assert pull(REPO).manifest == small.manifest
    assert hub.asked("GET", "deep/a.png") == []


def test_hub_is_not_asked_about_a_folder(
    hub: HubDouble, small: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull(str(small.folder)).manifest == small.manifest
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small.folder, REPO)
    assert pull(REPO).origin == REPO
    with pytest.raises(ArtefactError, match="is a folder on this machine and has no revision v1"):
        pull(REPO, "v1")
    for absent in ("./runs/absent", "runs/a/shared_adapter", "/absent", "absent"):
        with pytest.raises(HubError, match="neither a folder here nor a repository"):
            pull(absent)
    assert hub.requests == []


def test_hub_says_what_a_pull_does_not_find(hub: HubDouble, two: tuple[str, str]) -> None:
    with pytest.raises(HubError, match="no such repository"):
        pull(f"{OWNER}/other")
    for revision in ("v9", "0" * 40):
        with pytest.raises(HubError, match=r"no such commit, tag or branch.*pfm versions list"):
            pull(REPO, revision)
    with pytest.raises(HubError, match="no such commit, tag or branch"):
        the_hub.list_commits(REPO, "v9")
    api(hub).create_repo(f"{OWNER}/empty")
    with pytest.raises(ArtefactError, match=r"has no pfm_manifest\.json"):
        pull(f"{OWNER}/empty")


def test_hub_gated_repo_is_told(hub: HubDouble, two: tuple[str, str]) -> None:
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask."}
    hub.fail_next("GET", f"/api/models/{REPO}", 403, headers=gated, times=2)
    with pytest.raises(HubError, match=f"it is gated; ask for access at {hub.url}/{REPO}"):
        pull(REPO)
    with pytest.raises(HubError, match="it is gated"):
        the_hub.head_manifest(REPO)


def test_hub_that_is_away_leaves_what_was_pulled(
    hub: HubDouble, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    for revision in (None, "v1"):
        pull(REPO, revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert pull(REPO).origin == pull(REPO, second).origin == f"{REPO}@{second[:12]}"
    assert pull(REPO, "v1").origin == f"{REPO}@{first[:12]}"
    with pytest.raises(HubError, match="no whole copy of it was pulled before"):
        pull(REPO, "side")
    assert len(hub.requests) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    assert pull(REPO).manifest.round == 1


def test_hub_copy_that_is_not_whole_does_not_serve_offline(
    hub: HubDouble, two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pull(REPO).folder / "item_keys.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no whole copy of it was pulled before"):
        pull(REPO)


def test_hub_download_that_breaks_is_tried_again(hub: HubDouble, two: tuple[str, str]) -> None:
    hub.fail_next("GET", "/revision/v1", 503)
    hub.drop_next("GET", LARGE[0], after_bytes=50, reset=True)
    hub.drop_next("GET", "item_keys.json", after_bytes=5)
    assert pull(REPO, "v1").manifest.round == 0


@pytest.mark.parametrize("name", [LARGE[0], "item_keys.json", MANIFEST_FILE, CARD_FILE])
def test_hub_download_that_is_damaged_is_fetched_anew(
    name: str, hub: HubDouble, small: Artefact
) -> None:
    push(small)
    hub.corrupt(REPO, name)
    for _ in range(2):
        with pytest.raises(CorruptFileError, match=rf"{name} was damaged.*deleted from the cache"):
            pull(REPO)
    hub.corrupt(REPO, name)  # the same bit again
    before = len(hub.asked("GET", "/lfs/")) + len(hub.asked("GET", "/resolve/"))
    assert contents(pull(REPO).folder) == contents(small.folder)
    after = len(hub.asked("GET", "/lfs/")) + len(hub.asked("GET", "/resolve/"))
    assert after > before
    assert pull(REPO).manifest == small.manifest


def test_hub_file_that_both_versions_share_heals_for_both(
    hub: HubDouble, two: tuple[str, str]
) -> None:
    first, second = two
    folders = [pull(REPO, commit).folder for commit in two]
    blob = (folders[0] / "item_keys.json").resolve()
    assert blob == (folders[1] / "item_keys.json").resolve()
    blob.write_bytes(blob.read_bytes().swapcase())
    with pytest.raises(CorruptFileError, match=r"item_keys\.json was damaged"):
        pull(REPO, first)
    for commit in (second, first):
        assert pull(REPO, commit).origin.endswith(commit[:12])


def test_hub_cache_without_links_heals_too(
    hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    push(small)
    damaged = pull(REPO).folder / LARGE[1]
    assert not damaged.is_symlink()
    damaged.write_bytes(damaged.read_bytes()[::-1])
    with pytest.raises(CorruptFileError, match="SHA-256 differs"):
        pull(REPO)
    assert contents(pull(REPO).folder) == contents(small.folder)


def test_hub_repo_that_was_changed_by_hand_is_told(hub: HubDouble, small: Artefact) -> None:
    push(small)
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"[]", path_in_repo="item_keys.json")
    with pytest.raises(CorruptFileError, match=r"item_keys.*changed after it was published"):
        pull(REPO)
    assert pull(REPO, the_hub.list_commits(REPO)[1].commit_id).manifest == small.manifest
    changes = [CommitOperationDelete("item_keys.json")]
    api(hub).create_commit(REPO, changes, commit_message="less")
    with pytest.raises(CorruptFileError, match=r"item_keys\.json is missing"):
        pull(REPO)


def test_hub_file_that_no_manifest_lists_is_refused_but_a_plot(
    hub: HubDouble, small: Artefact
) -> None:
    push(small)
    more = {"repo_id": REPO, "path_or_fileobj": b"\0"}
    api(hub).upload_file(**more, path_in_repo="plots/more.png")
    assert pull(REPO).manifest == small.manifest
    api(hub).upload_file(**more, path_in_repo=BASIS_FILE)
    with pytest.raises(ArtefactError, match=f"{BASIS_FILE} is not in the manifest"):
        pull(REPO)


def test_hub_cache_that_cannot_be_written_is_told(
    hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push(small)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        pull(REPO)


# --- the head ---------------------------------------------------------------------------------


def test_hub_head_manifest_is_the_one_to_follow(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    assert the_hub.head_manifest(REPO) is None
    api(hub).create_repo(REPO)
    assert the_hub.head_manifest(REPO) is None
    pushed = push(small)
    expected = (small.manifest, small.manifest_sha256, pushed.revision)
    assert the_hub.head_manifest(REPO) == expected
    assert the_hub.head_manifest(REPO, "not/yet") == expected, "a branch would start from there"
    newer = upon_head(tmp_path / "newer", 1)
    push(newer, revision="side")
    assert the_hub.head_manifest(REPO) == expected
    side = the_hub.head_manifest(REPO, "side")
    assert side is not None
    assert side[1] == newer.manifest_sha256


def test_hub_head_manifest_that_is_damaged_is_told(hub: HubDouble, small: Artefact) -> None:
    push(small)
    hub.corrupt(REPO, MANIFEST_FILE)
    with pytest.raises(CorruptFileError, match="was damaged"):
        the_hub.head_manifest(REPO)
    hub.corrupt(REPO, MANIFEST_FILE)
    assert the_hub.head_manifest(REPO) is not None
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo=MANIFEST_FILE)
    with pytest.raises(CorruptFileError, match="has format None"):
        the_hub.head_manifest(REPO)


def test_hub_lists_commits_and_tags(hub: HubDouble, two: tuple[str, str]) -> None:
    hub.page_size = 1
    commits = the_hub.list_commits(REPO)
    assert [commit.commit_id for commit in commits[:2]] == list(reversed(two))
    assert [commit.title for commit in commits] == ["push", "push", "initial commit"]
    assert the_hub.list_commits(REPO, "v1")[0].commit_id == two[0]
    assert the_hub.list_tags(REPO) == {"v1": two[0]}


def test_hub_client_uses_no_settings_of_before(hub: HubDouble) -> None:
    """The endpoint is read when a client is made, as the fixture changes it."""
    assert calls.hub_api().endpoint == hub.url == os.environ["HF_ENDPOINT"]
