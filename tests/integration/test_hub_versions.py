"""Versions on the double of the Hub are listed and verified; who breaks a link is found."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfm_llm.base.errors import ArtefactError, HubError
from pfm_llm.publish import hub as the_hub
from pfm_llm.publish import signing
from pfm_llm.publish.artefact import (
    CARD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Artefact,
)
from pfm_llm.publish.manifest import Parent
from pfm_llm.publish.versions.chain import verify_chain
from pfm_llm.publish.versions.history import find_commit, list_versions
from pfm_llm.publish.versions.restore import rollback
from tests.support.hub_double import OWNER, HubDouble
from tests.support.pushes import api
from tests.support.small_artefacts import make_artefact
from tests.support.small_hub import (
    REPO,
    delete,
    key,
    logged_in,
    push,
    put,
    small,
    three,
    trained_from,
    two,
    upon_head,
)

__all__ = ["key", "logged_in", "small", "three", "two"]
pytestmark = pytest.mark.usefixtures("logged_in")


# --- listing ----------------------------------------------------------------------------------


def test_hub_versions_are_listed_newest_first(
    hub: HubDouble, three: list[str], key: signing.SigningKey
) -> None:
    api(hub).create_tag(REPO, tag="best", revision=three[1])
    versions = list_versions(REPO)
    assert [version.commit for version in versions] == three[::-1]
    assert [version.tags for version in versions] == [("v2",), ("best", "v1"), ("v0",)]
    assert [version.round for version in versions] == [2, 1, 0]
    assert {version.signed_by for version in versions} == {signing.public_key(key)}
    newest = versions[0]
    assert (newest.name, newest.title, newest.problem) == ("small", "push", "")
    assert newest.headline is not None
    assert newest.headline.value == pytest.approx(0.12)
    assert newest.parents[0].manifest_sha256 == versions[1].manifest_sha256
    assert (
        newest.date == hub.repo(REPO).commits[three[2]].date.replace(microsecond=0)
        or newest.date.tzinfo is not None
    )
    assert [version.commit for version in list_versions(REPO, "v1")] == three[1::-1]


def test_hub_versions_that_are_damaged_do_not_hide_the_others(
    hub: HubDouble, three: list[str]
) -> None:
    put(hub, MANIFEST_FILE, b"{}")
    put(hub, MANIFEST_FILE, b"not JSON")
    versions = list_versions(REPO)
    assert len(versions) == 5
    for version in versions[:2]:
        assert (version.manifest, version.signed_by) == (None, None)
        assert "the signature is not of this manifest" in version.problem
    assert "format None" in versions[1].problem
    assert "not valid JSON" in versions[0].problem
    assert [version.problem for version in versions[2:]] == [""] * 3


def test_hub_manifest_that_is_damaged_on_its_way_is_told_with_its_version(
    hub: HubDouble, three: list[str]
) -> None:
    hub.corrupt(REPO, MANIFEST_FILE)
    damaged, *others = list_versions(REPO)
    assert "was damaged on its way" in damaged.problem
    assert (damaged.commit, damaged.manifest, damaged.manifest_sha256) == (three[2], None, "")
    assert [version.problem for version in others] == ["", ""]


def test_hub_repo_without_versions_has_none(hub: HubDouble) -> None:
    api(hub).create_repo(REPO)
    assert list_versions(REPO) == []
    with pytest.raises(ArtefactError, match=r"no pfm_manifest\.json at main"):
        verify_chain(REPO)
    with pytest.raises(HubError, match="no such repository"):
        list_versions(f"{OWNER}/other")


def test_hub_commits_are_found_by_tag_and_unique_start(
    hub: HubDouble, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_commit(REPO, "v1") == three[1]
    for length in (8, 40):
        assert find_commit(REPO, three[0][:length].upper()) == three[0]
    for absent in ("v9", "abc", "main"):
        with pytest.raises(HubError, match=r"no tag.*4 to 40 hexadecimal digits"):
            find_commit(REPO, absent)
    unknown = next(f"{n:08x}" for n in range(9) if not any(o.startswith(f"{n:08x}") for o in three))
    with pytest.raises(HubError, match=f"no commit {unknown}"):
        find_commit(REPO, unknown)
    # A tag that looks like the start of a commit is a tag.
    api(hub).create_tag(REPO, tag=three[0][:8], revision=three[2])
    assert find_commit(REPO, three[0][:8]) == three[2]
    alike = [
        dataclasses.replace(commit, commit_id=f"abcd{n}" + "0" * 35)
        for n, commit in enumerate(the_hub.list_commits(REPO))
    ]
    monkeypatch.setattr(the_hub, "list_commits", lambda *_: alike)
    with pytest.raises(HubError, match=r"abcd may be abcd0.* or abcd1.*write more"):
        find_commit(REPO, "abcd")


# --- the chain --------------------------------------------------------------------------------


def test_hub_chain_that_is_whole_is_verified(
    hub: HubDouble, three: list[str], key: signing.SigningKey
) -> None:
    trusted = signing.public_key(key)
    for report in (verify_chain(REPO), verify_chain(REPO, trusted_key=trusted)):
        assert report.is_whole, report.problems
        assert [checked.version.commit for checked in report.versions] == three[::-1]
        assert all(checked.notes == () for checked in report.versions)
    assert len(verify_chain(REPO, "v1").versions) == 2


def test_hub_chain_that_is_not_signed_is_whole_unless_a_key_is_trusted(
    hub: HubDouble, two: tuple[str, str], key: signing.SigningKey
) -> None:
    report = verify_chain(REPO)
    assert report.is_whole
    assert [checked.version.signed_by for checked in report.versions] == [None, None]
    report = verify_chain(REPO, trusted_key=signing.public_key(key))
    assert len(report.problems) == 2
    assert all("it is not signed, and was to be" in problem for problem in report.problems)
    with pytest.raises(ArtefactError, match="not base64 of 32 bytes"):
        verify_chain(REPO, trusted_key="mine")


def test_hub_card_may_be_edited(hub: HubDouble, three: list[str]) -> None:
    put(hub, CARD_FILE, b"---\nlicense: mit\n---\n")
    report = verify_chain(REPO)
    assert report.is_whole, report.problems
    assert len(report.versions) == 4


def test_hub_chain_with_another_key_is_told(
    hub: HubDouble, three: list[str], tmp_path: Path, key: signing.SigningKey
) -> None:
    signing.new_key(tmp_path / "thief.pem")
    thief = signing.load_key(tmp_path / "thief.pem")
    stolen = push(upon_head(tmp_path / "stolen", 9, thief)).revision
    assert verify_chain(REPO).is_whole
    report = verify_chain(REPO, trusted_key=signing.public_key(key))
    assert report.problems == (
        f"{stolen[:12]}: it is signed with the key {signing.public_key(thief)}, "
        f"not with the trusted {signing.public_key(key)}",
    )


def test_hub_chain_says_which_version_has_another_file(hub: HubDouble, three: list[str]) -> None:
    hub.corrupt(REPO, "item_keys.json", three[1])
    problems = verify_chain(REPO).problems
    # One content, three versions: the blob is the same.
    assert [problem[:12] for problem in problems] == [oid[:12] for oid in three[::-1]]
    hub.corrupt(REPO, "item_keys.json", three[1])
    assert verify_chain(REPO).is_whole
    changed = put(hub, ITEM_KEYS_FILE, b"[]")
    problems = verify_chain(REPO).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{changed[:12]}: ")
    assert "item_keys.json is not the file that the manifest lists" in problems[0]


def tampered(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The head's manifest, changed."""
    content = the_hub.read_file(REPO, "main", MANIFEST_FILE)
    assert content is not None
    tree = json.loads(content)
    change(tree)
    return json.dumps(tree).encode()


def test_hub_manifest_that_was_changed_does_not_fit_its_signature(
    hub: HubDouble, three: list[str]
) -> None:
    commit = put(hub, MANIFEST_FILE, tampered(lambda tree: tree.update(round=99)))
    problems = verify_chain(REPO).problems
    assert all(problem.startswith(commit[:12]) for problem in problems)
    assert "the signature is not of this manifest" in problems[0]
    with pytest.raises(ArtefactError, match=f"{REPO}@{commit[:12]}: the signature is not of"):
        rollback(REPO, commit[:8])


def test_hub_manifest_that_was_changed_and_not_signed_breaks_the_link(
    hub: HubDouble, three: list[str]
) -> None:
    delete(hub, SIGNATURE_FILE)
    commit = put(hub, MANIFEST_FILE, tampered(lambda tree: tree.update(round=99)))
    problems = verify_chain(REPO).problems
    # It names v1 as the version before it; the honest v2 stands between.
    assert problems == (
        f"{commit[:12]}: it follows the previous version {three[1][:12]}, "
        f"but {the_hub.list_commits(REPO)[1].commit_id[:12]} stands before it in the history",
    )


def test_hub_link_to_another_manifest_is_told(
    hub: HubDouble, three: list[str], tmp_path: Path
) -> None:
    parent = Parent(relation="previous", manifest_sha256="f" * 64, repo=REPO, revision=three[2])
    last = push(make_artefact(tmp_path / "next", 7, parents=(parent,))).revision
    problems = verify_chain(REPO).problems
    assert len(problems) == 1
    assert problems[0].startswith(
        f"{last[:12]}: the previous version {three[2][:12]} has another manifest than it says"
    )


def test_hub_versions_that_name_no_or_another_version_before_them_are_told(
    hub: HubDouble, three: list[str], tmp_path: Path
) -> None:
    none = push(make_artefact(tmp_path / "none", 7)).revision
    assert verify_chain(REPO).problems == (
        f"{none[:12]}: it does not name the version before it, {three[2][:12]}",
    )
    gone = Parent(relation="previous", manifest_sha256="f" * 64, repo="x/y", revision="9" * 40)
    cut = push(make_artefact(tmp_path / "cut", 8, parents=(gone,))).revision
    assert verify_chain(REPO).problems[0] == (
        f"{cut[:12]}: the previous version 999999999999 is not in the history, "
        "which was cut or rewritten"
    )


def test_hub_history_that_was_cut_is_told(hub: HubDouble, three: list[str], tmp_path: Path) -> None:
    newest = the_hub.pull(REPO, "v2").folder
    api(hub).delete_repo(REPO)
    api(hub).create_repo(REPO)
    api(hub).upload_folder(repo_id=REPO, folder_path=newest)
    problems = verify_chain(REPO).problems
    assert len(problems) == 1
    assert f"the previous version {three[1][:12]} is not in the history" in problems[0]


def test_hub_manifest_that_cannot_be_read_is_told(hub: HubDouble, three: list[str]) -> None:
    delete(hub, SIGNATURE_FILE)
    commit = put(hub, MANIFEST_FILE, b"{}")
    problems = verify_chain(REPO).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"{commit[:12]}: ")
    assert "format None" in problems[0]


def test_hub_adapter_that_another_was_trained_from_is_checked(
    hub: HubDouble, small: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = f"{OWNER}/origin"
    source = the_hub.push_folder(small.folder, origin, message="push").revision
    sha256 = small.manifest_sha256
    cases: list[tuple[str, str, str | None, str, bool]] = [
        (origin, sha256, source, "", False),
        (origin, sha256, None, "", False),
        (origin, "f" * 64, source, "has another manifest than it says", True),
        (origin, "f" * 64, "main", "that revision has moved on since", False),
        (origin, sha256, "v9", "", False),
        ("exported", sha256, None, "was a local folder: not checked", False),
        (f"{OWNER}/gone", sha256, source, "no such repository to see", False),
    ]
    for number, (repo, sha, revision, message, wrong) in enumerate(cases):
        name = f"{OWNER}/small-{number}"
        artefact = trained_from(tmp_path / f"{number}", repo, sha, revision)
        the_hub.push_folder(artefact.folder, name, message="push")
        report = verify_chain(name)
        notes = list(report.versions[0].notes)
        found = list(report.problems) if wrong else notes
        assert report.is_whole != wrong
        assert len(found) == bool(message), (report.problems, notes)
        assert message in "".join(found)
    hub.fail_next("GET", f"/api/models/{origin}", 503, times=8)
    report = verify_chain(f"{OWNER}/small-0")
    assert report.is_whole
    assert "not checked (cannot read" in report.versions[0].notes[0]
    hub.clear_faults()
