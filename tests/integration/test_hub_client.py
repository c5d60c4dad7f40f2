"""Publishing through the real client, against the double of the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from pfm_llm.base.errors import ArtefactError, CorruptFileError, HubError
from pfm_llm.publish import hub as the_hub
from pfm_llm.publish.artefact import BASIS_FILE, CARD_FILE, MANIFEST_FILE, Artefact
from pfm_llm.publish.hub import pull, push_folder, sending
from tests.support.hub_double import OWNER, HubDouble
from tests.support.pushes import api
from tests.support.small_artefacts import contents
from tests.support.small_hub import (
    LARGE,
    REPO,
    logged_in,
    num_commits,
    push,
    small,
    stored,
    two,
    upon_head,
)

__all__ = ["logged_in", "small", "two"]
pytestmark = pytest.mark.usefixtures("logged_in")


# --- pushing ----------------------------------------------------------------------------------


def test_hub_holds_what_was_pushed_after_one_commit(hub: HubDouble, small: Artefact) -> None:
    pushed = push(small, tag="v1")
    repo = hub.repo(REPO)
    assert stored(hub) == contents(small.folder)
    assert (num_commits(hub), repo.private, repo.tags) == (1, True, {"v1": pushed.revision})
    assert repo.at("main").oid == pushed.revision
    assert repo.at("main").message == "push"
    assert pushed == the_hub.Pushed(
        REPO, pushed.revision, f"{hub.url}/{REPO}/tree/{pushed.revision}", True
    )
    assert len(hub.asked("PUT")) == len(LARGE)
    assert hub.waits == []


def test_hub_gets_nothing_when_the_same_is_pushed_again(hub: HubDouble, small: Artefact) -> None:
    first = push(small, tag="v1")
    sent = len(hub.asked("POST")), len(hub.asked("PUT"))
    again = push(small, tag="v1")
    assert (again.revision, again.changed) == (first.revision, False)
    assert len(hub.asked("PUT")) == sent[1]
    new = hub.asked("POST")[sent[0] :]
    assert [request.path for request in new] == [f"/api/models/{REPO}/tag/{first.revision}"]
    assert num_commits(hub) == 1
    push(small, tag="v2")
    assert hub.repo(REPO).tags == {"v1": first.revision, "v2": first.revision}


def test_hub_keeps_the_visibility_of_a_repo_that_is_there(hub: HubDouble, small: Artefact) -> None:
    api(hub).create_repo(REPO, private=False)
    push(small)
    assert not hub.repo(REPO).private
    push_folder(small.folder, f"{OWNER}/open", private=False, message="push")
    assert not hub.repo(f"{OWNER}/open").private


def test_hub_holds_exactly_the_new_files_and_what_is_not_ours(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    (small.folder / "plots").mkdir()
    (small.folder / "plots/loss.png").write_bytes(b"\x89PNG\0")
    push(small)
    for name in ("notes.txt", "plots/deeper/mine.png"):
        api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"mine", path_in_repo=name)
    uploads = len(hub.asked("PUT"))
    newer = upon_head(tmp_path / "newer", 1)
    push(newer)
    foreign = {"notes.txt": b"mine", "plots/deeper/mine.png": b"mine"}
    assert stored(hub) == contents(newer.folder) | foreign
    assert len(hub.asked("PUT")) == uploads + len(LARGE)
    for path in hub.repo(REPO).at("main").tree:
        assert path in {*contents(newer.folder), *foreign, ".gitattributes"}


def test_hub_is_sent_only_files_that_changed(hub: HubDouble, small: Artefact) -> None:
    push(small)
    (small.folder / CARD_FILE).write_text("---\nlicense: mit\n---\n")
    before = len(hub.asked("PUT"))
    assert push(small).changed
    assert len(hub.asked("PUT")) == before
    assert len(hub.asked("POST", "objects/batch")) == 1, "only the first push had large files"


def test_hub_gets_a_branch_that_starts_from_main(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    first = push(small)
    newer = upon_head(tmp_path / "newer", 1)
    pushed = push(newer, revision="try/it")
    repo = hub.repo(REPO)
    assert (repo.branches["main"], repo.branches["try/it"]) == (first.revision, pushed.revision)
    assert repo.at("try/it").parent == first.revision
    assert not push(newer, revision="try/it").changed


def test_hub_takes_pushes_to_branches_only(hub: HubDouble, small: Artefact) -> None:
    pushed = push(small, tag="v1")
    for revision in ("v1", pushed.revision):
        with pytest.raises(HubError, match="only a branch"):
            push(small, revision=revision)
    assert list(hub.repo(REPO).branches) == ["main"]


@pytest.mark.parametrize("name", ["private_lora.safetensors", ".hidden", "plots/a/b.png"])
def test_hub_gets_nothing_that_has_no_place_there(
    name: str, hub: HubDouble, small: Artefact
) -> None:
    (small.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (small.folder / name).write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"has no place in.*nothing was sent"):
        push(small)
    assert hub.requests == []


def test_hub_gets_no_folder_without_a_manifest(hub: HubDouble, small: Artefact) -> None:
    (small.folder / MANIFEST_FILE).unlink()
    with pytest.raises(ArtefactError, match="not a shared adapter"):
        push(small)
    with pytest.raises(ArtefactError, match="not a shared adapter"):
        push_folder(small.folder / "absent", REPO, message="push")
    assert hub.requests == []


def test_hub_gets_nothing_that_its_manifest_does_not_cover(hub: HubDouble, small: Artefact) -> None:
    (small.folder / BASIS_FILE).write_bytes(b"")
    with pytest.raises(ArtefactError, match=f"{BASIS_FILE} is not in the manifest"):
        push(small)
    (small.folder / BASIS_FILE).unlink()
    (small.folder / "item_keys.json").write_text("[]")
    with pytest.raises(CorruptFileError, match=r"item_keys\.json is not the file"):
        push(small)
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo", ["small", "a/b/c", "alice/", "/small", "alice/two--dashes", "alice/a.git", "alice/ä"]
)
def test_hub_is_not_asked_about_what_is_no_repo(repo: str, hub: HubDouble, small: Artefact) -> None:
    with pytest.raises(HubError, match="user/name"):
        push_folder(small.folder, repo, message="push")
    with pytest.raises(HubError, match="user/name"):
        pull(repo)
    assert hub.requests == []


# --- tags -------------------------------------------------------------------------------------


def test_hub_tag_of_another_commit_stops_a_push_before_it_starts(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    first = push(small, tag="v1")
    newer = upon_head(tmp_path / "newer", 1)
    with pytest.raises(HubError, match=rf"v1 is on commit {first.revision[:12]}.*a new commit"):
        push(newer, tag="v1")
    assert num_commits(hub) == 1
    second = push(newer)
    with pytest.raises(HubError) as caught:
        push(newer, tag="v1")
    for part in (first.revision[:12], second.revision[:12], f"hf repo tag delete {REPO} v1"):
        assert part in str(caught.value)
    assert hub.repo(REPO).tags == {"v1": first.revision}


def test_hub_tag_whose_answer_was_lost_is_fine(hub: HubDouble, small: Artefact) -> None:
    hub.drop_next("POST", "/tag/", done=True)
    pushed = push(small, tag="v1")
    assert hub.repo(REPO).tags == {"v1": pushed.revision}
    assert hub.waits == [1]


def test_hub_tag_that_somebody_else_set_meanwhile_is_told(
    hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure = sending._ensure_tag

    def late(repo: str, tag: str, commit: str) -> None:
        first = next(iter(hub.repo(REPO).commits))
        api(hub).create_tag(repo, tag=tag, revision=first)
        ensure(repo, tag, commit)

    monkeypatch.setattr(sending, "_ensure_tag", late)
    with pytest.raises(HubError, match="the tag v1 is on commit"):
        push(small, tag="v1")


def test_hub_refuses_a_tag_that_is_no_name(hub: HubDouble, small: Artefact) -> None:
    with pytest.raises(HubError, match="Invalid reference name"):
        push(small, tag="not a name")


# --- somebody else ----------------------------------------------------------------------------


def test_hub_push_upon_an_older_head_is_refused(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    first = push(small)
    mine, theirs = upon_head(tmp_path / "mine", 1), upon_head(tmp_path / "theirs", 2)
    second = push(theirs)
    with pytest.raises(HubError, match=r"somebody else has pushed.*run again") as caught:
        push(mine)
    assert first.revision[:12] in str(caught.value)
    assert second.revision[:12] in str(caught.value)
    assert stored(hub) == contents(theirs.folder)
    assert push(upon_head(tmp_path / "again", 1)).changed


def test_hub_push_upon_a_head_whose_card_was_edited_is_fine(
    hub: HubDouble, small: Artefact, tmp_path: Path
) -> None:
    push(small)
    newer = upon_head(tmp_path / "newer", 1)
    api(hub).upload_file(
        repo_id=REPO, path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo=CARD_FILE
    )
    push(newer)
    assert stored(hub) == contents(newer.folder)


def before_the_commit(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Call once when the next push has uploaded its files, and is about to commit."""
    upload = HfApi.preupload_lfs_files

    def late(self: HfApi, *arguments: Any, **options: Any) -> None:
        upload(self, *arguments, **options)
        monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
        call()

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)


def test_hub_push_during_another_push_is_refused(
    hub: HubDouble, small: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(small)
    mine, theirs = upon_head(tmp_path / "mine", 1), upon_head(tmp_path / "theirs", 2)
    before_the_commit(monkeypatch, lambda: push(theirs))
    with pytest.raises(HubError, match="somebody else has pushed"):
        push(mine)
    assert [request.status for request in hub.asked("POST", "/commit/")] == [200, 200, 412]
    assert stored(hub) == contents(theirs.folder)


def test_hub_push_of_what_somebody_else_just_pushed_is_done(
    hub: HubDouble, small: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(small)
    mine = upon_head(tmp_path / "mine", 1)
    before_the_commit(monkeypatch, lambda: push(mine))
    assert push(mine).revision == hub.repo(REPO).at("main").oid
    assert num_commits(hub) == 2
