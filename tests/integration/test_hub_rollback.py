"""Rolling back on the double of the Hub, and the script for all that concerns versions."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants

from pfm_llm.base.errors import HubError
from pfm_llm.publish import signing
from pfm_llm.publish.artefact import ITEM_KEYS_FILE, SIGNATURE_FILE, Artefact
from pfm_llm.publish.manifest import Parent
from pfm_llm.publish.versions.chain import verify_chain
from pfm_llm.publish.versions.history import list_versions
from pfm_llm.publish.versions.restore import rollback
from tests.support.hub_double import READ_TOKEN, HubDouble
from tests.support.scripts import run_script
from tests.support.small_artefacts import contents, make_artefact
from tests.support.small_hub import (
    REPO,
    key,
    logged_in,
    num_commits,
    push,
    put,
    small,
    stored,
    three,
    trained_from,
    two,
    upon_head,
)

__all__ = ["key", "logged_in", "small", "three", "two"]
pytestmark = pytest.mark.usefixtures("logged_in")


# --- rolling back -----------------------------------------------------------------------------


def test_hub_rollback_is_a_new_commit_with_the_old_files(
    hub: HubDouble, three: list[str], key: signing.SigningKey
) -> None:
    uploads = len(hub.asked("PUT"))
    pushed = rollback(REPO, "v0", signing_key=key)
    files, old = stored(hub), stored(hub, three[0])
    assert pushed.changed
    assert {n: c for n, c in files.items() if not n.startswith("pfm_manifest")} == {
        n: c for n, c in old.items() if not n.startswith("pfm_manifest")
    }
    assert len(hub.asked("PUT")) == uploads, "the Hub has the large files"
    repo = hub.repo(REPO)
    assert repo.at("main").parent == three[2], "history is not rewritten"
    assert repo.at("main").message == f"Roll back to {three[0][:12]}"
    newest, *others = list_versions(REPO)
    assert {p.relation: (p.revision, p.manifest_sha256) for p in newest.parents} == {
        "previous": (three[2], others[0].manifest_sha256),
        "restored": (three[0], others[2].manifest_sha256),
    }
    assert (newest.round, newest.signed_by) == (0, signing.public_key(key))
    assert verify_chain(REPO, trusted_key=signing.public_key(key)).is_whole


def test_hub_rollback_without_a_key_is_not_signed_and_says_so(
    hub: HubDouble, three: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rollback(REPO, three[1][:8])
    assert "is signed; what is restored from it is not" in caplog.text
    assert SIGNATURE_FILE not in stored(hub)
    report = verify_chain(REPO)
    assert report.is_whole, report.problems
    assert report.versions[0].version.signed_by is None


def test_hub_rollback_again_changes_nothing(
    hub: HubDouble, three: list[str], key: signing.SigningKey
) -> None:
    assert not rollback(REPO, "v2").changed
    assert not rollback(REPO, three[2], signing_key=key).changed
    first = rollback(REPO, "v0", signing_key=key)
    again = rollback(REPO, "v0")
    assert (again.revision, again.changed) == (first.revision, False)
    assert num_commits(hub) == 4
    assert rollback(REPO, "v2").changed
    assert list_versions(REPO)[0].round == 2
    assert verify_chain(REPO).is_whole


def test_hub_rollback_keeps_what_it_was_trained_from_and_drops_older_links(
    hub: HubDouble, tmp_path: Path
) -> None:
    push(trained_from(tmp_path / "first", "x/y", "a" * 64, None), tag="v0")
    push(upon_head(tmp_path / "second", 1), tag="v1")
    rollback(REPO, "v0")
    back = rollback(REPO, "v1").revision
    parents = list_versions(REPO)[0].parents
    assert [parent.relation for parent in parents] == ["restored", "previous"]
    again = rollback(REPO, "v0")
    parents = list_versions(REPO)[0].parents
    assert again.changed
    assert [parent.relation for parent in parents] == ["trained_from", "restored", "previous"]
    assert parents[2].revision == back
    report = verify_chain(REPO)
    assert report.is_whole, report.problems


def test_hub_rollback_that_claims_other_files_is_told(
    hub: HubDouble, three: list[str], tmp_path: Path
) -> None:
    versions = list_versions(REPO)
    parents = tuple(
        Parent(relation=relation, manifest_sha256=v.manifest_sha256, repo=REPO, revision=v.commit)
        for relation, v in (("previous", versions[0]), ("restored", versions[2]))
    )
    commit = push(make_artefact(tmp_path / "liar", 42, parents=parents)).revision
    assert verify_chain(REPO).problems == (
        f"{commit[:12]}: it says that it restores {three[0][:12]}, but has other files",
    )


def test_hub_rollback_of_a_branch_leaves_the_others(
    hub: HubDouble, three: list[str], tmp_path: Path
) -> None:
    push(upon_head(tmp_path / "side", 7), revision="side")
    back = rollback(REPO, "v0", revision="side")
    assert hub.repo(REPO).branches == {"main": three[2], "side": back.revision}
    assert verify_chain(REPO, "side").is_whole


def test_hub_rollback_to_what_is_damaged_or_absent_does_nothing(
    hub: HubDouble, three: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="no tag 'v9'"):
        rollback(REPO, "v9")
    with pytest.raises(HubError, match="no such commit, tag or branch"):
        rollback(REPO, "0" * 40)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(HubError, match="write access to alice"):
        rollback(REPO, "v0")
    assert num_commits(hub) == 3


# --- the script -------------------------------------------------------------------------------


def script(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    outcome = run_script("adapter_versions.py", *arguments, capsys=capsys)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_hub_script_lists_and_compares(
    hub: HubDouble, three: list[str], small: Artefact, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = script(capsys, "list", REPO)
    lines = listed.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[0] == three[2][:12]
    assert "0.1200 [0.1100, 0.1300]" in lines[1]
    assert f"previous {three[1][:12]}" in lines[1]
    tree = json.loads(script(capsys, "list", REPO, "--json"))
    assert [version["tags"] for version in tree] == [["v2"], ["v1"], ["v0"]]
    diff = script(capsys, "diff", f"{REPO}@v0", small.folder)
    assert "settings: the same" in diff
    assert "0.00%" in diff
    diff = script(capsys, "diff", f"{REPO}@v0", REPO)
    assert "model.layers.9.self_attn.q_proj" in diff
    assert "+0.0200" in diff
    tree = json.loads(script(capsys, "diff", f"{REPO}@v0", f"{REPO}@{three[1]}", "--json"))
    assert tree["modules"][0]["norm"] > 0
    assert tree["metrics"][0]["difference"] == pytest.approx(0.01)


def test_hub_script_verifies_with_an_exit_code(
    hub: HubDouble,
    three: list[str],
    key: signing.SigningKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trusted = signing.public_key(key)
    assert "the chain is whole" in script(capsys, "verify", REPO, "--trusted-key", trusted)
    other = signing.new_key(tmp_path / "other.pem")
    outcome = run_script(
        "adapter_versions.py", "verify", REPO, "--trusted-key", other, capsys=capsys
    )
    assert outcome.code == 1
    assert "3 problem(s)" in outcome.out
    assert outcome.out.count("WRONG") == 3
    put(hub, ITEM_KEYS_FILE, b"[]")
    outcome = run_script("adapter_versions.py", "verify", REPO, "--json", capsys=capsys)
    tree = json.loads(outcome.out)
    assert (outcome.code, tree["whole"]) == (1, False)
    assert [bool(version["problems"]) for version in tree["versions"]] == [True] + [False] * 3


def test_hub_script_makes_keys_rolls_back_and_pulls(
    hub: HubDouble, three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pem, target = tmp_path / "mine.pem", tmp_path / "got"
    made = script(capsys, "keygen", pem)
    public = signing.public_key(signing.load_key(pem))
    assert public in made
    back = script(capsys, "rollback", REPO, "--to", "v0", "--signing-key", pem)
    assert f"signed by {public}" in back
    assert "holds that version already" in script(capsys, "rollback", REPO, "--to", "v0")
    assert "not signed" in script(capsys, "rollback", REPO, "--to", three[1][:10])
    assert str(target) in script(capsys, "pull", REPO, "--revision", "v1", "--to", target)
    assert contents(target) == stored(hub, "v1")
    outcome = run_script("adapter_versions.py", "pull", REPO, "--to", target, capsys=capsys)
    assert outcome.code == 2
    assert "is not empty" in outcome.err
    outcome = run_script("adapter_versions.py", "keygen", pem, capsys=capsys)
    assert (outcome.code, "never replaced" in outcome.err) == (2, True)


def test_hub_script_explains_offline(
    hub: HubDouble, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = run_script("adapter_versions.py", "list", REPO, capsys=capsys)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: cannot list the tags of {REPO}: HF_HUB_OFFLINE is set")
