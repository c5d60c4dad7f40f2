"""A run's shared adapter is pushed whole and checked; what is private is never pushed."""

import dataclasses
import hashlib
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pfm_llm.base.errors import (
    ArtefactError,
    ConfigError,
    CorruptFileError,
    HubError,
    PrivateLeakError,
    StorageError,
)
from pfm_llm.publish import hub as the_hub
from pfm_llm.publish import signing
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    read_artefact,
)
from pfm_llm.publish.manifest import Manifest, Parent
from pfm_llm.publish.publishing import PublishRequest, plan, publish
from pfm_llm.publish.staging import stage
from pfm_llm.runs.experiment import run_experiment
from pfm_llm.runs.folders import RunFolders
from pfm_llm.runs.opening import open_run
from pfm_llm.runs.publication import request_of
from tests.support.exports import (
    a_private_state,
    change_tensors,
    copy_of,
    exported,
    in_a_plot,
    manifest_of,
    numbers_as,
    private,
    run,
    save_both_with_peft,
    seal,
    some_b,
    state_files,
    write_private_adapter,
)
from tests.support.hub_double import OWNER, WRITE_TOKEN, HubDouble
from tests.support.pushes import without_the_hubs
from tests.support.scripts import run_script
from tests.support.tiny import Tiny

__all__ = ["exported", "private", "run"]
REPO = f"{OWNER}/films"


@pytest.fixture
def request_(run: Path) -> PublishRequest:
    return request_of(run, REPO)


@pytest.fixture
def logged_in(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    return hub


def on_hub(hub: HubDouble, revision: str = "main") -> dict[str, bytes]:
    return without_the_hubs(hub.repo(REPO).files(revision))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def num_sent(hub: HubDouble) -> int:
    """Requests that would change something."""
    return sum(
        request.method not in {"GET", "HEAD"} and "/preupload/" not in request.path
        for request in hub.requests
    )


# --- what is pushed ---------------------------------------------------------------------------


def manifest_at(pushed: the_hub.Pushed) -> Manifest:
    return the_hub.pull(REPO, pushed.revision).manifest


def test_hub_holds_exactly_what_was_planned(
    request_: PublishRequest, run: Path, logged_in: HubDouble
) -> None:
    before = state_files(run.parent)
    planned = {file.name: (file.size, file.sha256) for file in plan(request_)}
    assert logged_in.requests == []
    published = publish(dataclasses.replace(request_, tag="v1"))
    files = on_hub(logged_in)
    assert planned == {name: (len(content), sha256(content)) for name, content in files.items()}
    repo = logged_in.repo(REPO)
    assert (repo.private, repo.tags) == (True, {"v1": published.revision})
    assert repo.at("main").message == "tiny, round 4"
    for name in manifest_of(run / "shared_adapter").files:
        assert files[name] == (run / "shared_adapter" / name).read_bytes()
    assert files[MANIFEST_FILE] == (run / "shared_adapter" / MANIFEST_FILE).read_bytes()
    assert state_files(run.parent) == before, "the run and its private folder are as they were"


def test_hub_gets_nothing_when_the_same_is_published_again(
    request_: PublishRequest, logged_in: HubDouble
) -> None:
    first = publish(request_)
    sent = num_sent(logged_in)
    again = publish(request_)
    assert again == dataclasses.replace(first, changed=False)
    assert num_sent(logged_in) == sent
    publish(dataclasses.replace(request_, tag="v1"))
    assert logged_in.repo(REPO).tags == {"v1": first.revision}
    assert num_sent(logged_in) == sent + 1


def test_hub_keeps_a_card_that_was_edited_there(
    request_: PublishRequest, logged_in: HubDouble
) -> None:
    publish(request_)
    card = b"---\nlicense: mit\n---\n# Mine\n"
    the_api = the_hub.calls.hub_api()
    the_api.upload_file(repo_id=REPO, path_or_fileobj=card, path_in_repo=CARD_FILE)
    assert not publish(request_).changed
    assert on_hub(logged_in)[CARD_FILE] == card


def test_hub_versions_are_linked(
    request_: PublishRequest, exported: Path, logged_in: HubDouble
) -> None:
    source = Parent(relation="trained_from", manifest_sha256="a" * 64, repo="bob/other")
    seal(exported, parents=(source,))
    first = publish(dataclasses.replace(request_, exported=exported))
    assert manifest_at(first).parents == (source,)
    seal(exported, round=8)
    second = publish(dataclasses.replace(request_, exported=exported))
    link = Parent(
        relation="previous",
        manifest_sha256=sha256(on_hub(logged_in, first.revision)[MANIFEST_FILE]),
        repo=REPO,
        revision=first.revision,
    )
    assert manifest_at(second).parents == (link, source)
    content = on_hub(logged_in)[MANIFEST_FILE]
    assert content == manifest_at(second).to_bytes()
    head = (manifest_at(second), sha256(content), second.revision)
    assert the_hub.head_manifest(REPO) == head
    sent = num_sent(logged_in)
    assert not publish(dataclasses.replace(request_, exported=exported)).changed, (
        "but for its parents it is there"
    )
    assert num_sent(logged_in) == sent
    assert the_hub.pull(REPO).manifest == manifest_at(second), "all files are as it lists them"


def test_hub_branch_gets_its_own_version(
    request_: PublishRequest, exported: Path, logged_in: HubDouble
) -> None:
    first = publish(request_)
    seal(exported, round=8)
    on_branch = dataclasses.replace(request_, revision="trial")
    second = publish(dataclasses.replace(on_branch, exported=exported))
    assert manifest_at(second).parents[0].revision == first.revision
    branches = logged_in.repo(REPO).branches
    assert branches == {"main": first.revision, "trial": second.revision}
    seal(exported, round=9)
    third = publish(dataclasses.replace(on_branch, exported=exported))
    assert manifest_at(third).parents[0].revision == second.revision


def test_hub_signature_is_of_what_was_pushed(
    request_: PublishRequest, exported: Path, logged_in: HubDouble, tmp_path: Path
) -> None:
    public = signing.new_key(tmp_path / "key.pem")
    signed = dataclasses.replace(request_, signing_key=tmp_path / "key.pem")
    unsigned = publish(request_)
    assert SIGNATURE_FILE not in on_hub(logged_in)
    # Signing later adds the signature and makes no other version.
    later = publish(signed)
    files = on_hub(logged_in)
    assert later.changed
    assert manifest_at(later) == manifest_at(unsigned)
    assert signing.verify(files[MANIFEST_FILE], files[SIGNATURE_FILE], public) == public
    assert not publish(signed).changed
    assert not publish(request_).changed, "a signature that is there stays"
    seal(exported, round=8)
    publish(dataclasses.replace(signed, exported=exported))
    files = on_hub(logged_in)
    assert signing.verify(files[MANIFEST_FILE], files[SIGNATURE_FILE], public) == public
    seal(exported, round=9)
    publish(dataclasses.replace(request_, exported=exported))
    assert SIGNATURE_FILE not in on_hub(logged_in), "it is not of this version"
    with pytest.raises(StorageError, match="cannot read the signing key"):
        plan(dataclasses.replace(request_, signing_key=tmp_path / "absent.pem"))


def test_hub_card_tells_how_to_load_and_is_read_by_the_client(
    request_: PublishRequest, run: Path, logged_in: HubDouble
) -> None:
    publish(request_)
    text = on_hub(logged_in)[CARD_FILE].decode()
    assert f"PeftModel.from_pretrained(base, '{REPO}')" in text
    assert f"Recommender.from_pretrained('{REPO}'" in text
    assert "path/to/this/folder" not in text
    assert "--config training_config.yaml" in text
    rows = json.loads((run / "results.json").read_text())["rows"]
    row = next(
        r
        for r in rows
        if (r["mode"], r["split"], r["metric"], r["k"], r["candidates"])
        == ("shared_only", "test", "ndcg", 10, "full")
    )
    results = {r.metric_name: r for r in ModelCard(text).data.eval_results}
    found = results["NDCG@10, full catalogue"]
    assert found.metric_value == pytest.approx(row["value"], abs=1e-6)
    interval = [found.metric_args[key] for key in ("ci_low", "ci_high")]
    assert interval == pytest.approx([row["ci_low"], row["ci_high"]], abs=1e-6)


def test_hub_adapter_is_loaded_by_plain_peft(
    request_: PublishRequest, run: Path, tiny: Tiny, logged_in: HubDouble
) -> None:
    publish(request_)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.model), source)(
                tokens
            ).logits
            for source in (REPO, str(run / "shared_adapter"))
        ]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_hub_is_not_needed_for_a_plan(
    request_: PublishRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(AssertionError):
        urllib.request.urlopen("http://127.0.0.1:9")
    assert len(plan(request_)) == len({file.name for file in plan(request_)}) > 8
    with pytest.raises(HubError, match="user/name"):
        plan(dataclasses.replace(request_, repo="films"))


# --- what is needed, and what is refused ------------------------------------------------------


def test_without_the_private_store_nothing_is_published(
    run: Path, exported: Path, tmp_path: Path, logged_in: HubDouble
) -> None:
    with pytest.raises(ArtefactError, match=r"no private store at .*elsewhere.*nothing was sent"):
        stage(exported, tmp_path / "staged", tmp_path / "elsewhere")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    with pytest.raises(ArtefactError, match=r"no private store at .*moved\.private"):
        publish(request_of(moved, REPO))
    with pytest.raises(ConfigError, match=r"no run at .*no_run"):
        publish(request_of(tmp_path / "no_run", REPO))
    assert logged_in.requests == []


def test_a_run_without_private_adapters_needs_no_private_store(
    tiny: Tiny, tmp_path: Path, logged_in: HubDouble
) -> None:
    run = run_experiment(tiny.config(tmp_path / "runs", adapters__private__enabled=False))
    shutil.rmtree(RunFolders.of(run).private)
    assert publish(request_of(run, REPO)).changed
    assert "private_basis.safetensors" not in on_hub(logged_in)


@pytest.mark.parametrize("kind", ["shared_basis", "taste", "hyper_lora"])
def test_a_basis_is_published(kind: str, tiny: Tiny, tmp_path: Path, logged_in: HubDouble) -> None:
    run = run_experiment(tiny.config(tmp_path / "runs", adapters__private__kind=kind))
    publish(request_of(run, REPO))
    assert "private_basis.safetensors" in on_hub(logged_in)
    folder = copy_of(run / "shared_adapter", tmp_path / "copy")
    change_tensors(folder, "private_basis.safetensors", lambda t: t.popitem())
    seal(folder)
    with pytest.raises(ArtefactError, match=r"private_basis.safetensors lacks basis\."):
        publish(request_of(run, REPO, folder))
    (folder / "private_basis.safetensors").unlink()
    seal(folder, names=[n for n in manifest_of(folder).files if "basis" not in n])
    with pytest.raises(ArtefactError, match=r"private_basis.safetensors is missing"):
        publish(request_of(run, REPO, folder))


def test_hub_run_may_be_named_by_a_link(
    run: Path, private: Path, tmp_path: Path, logged_in: HubDouble
) -> None:
    (tmp_path / "latest").symlink_to(run)
    folder = copy_of(run / "shared_adapter", tmp_path / "copy")
    in_a_plot(folder, numbers_as(some_b(a_private_state(private)), torch.float32))
    seal(folder)
    request = request_of(tmp_path / "latest", REPO)
    with pytest.raises(PrivateLeakError):
        publish(dataclasses.replace(request, exported=folder))
    assert publish(request).changed


def test_hub_gets_no_private_adapter_under_the_shared_one_s_names(
    request_: PublishRequest, exported: Path, private: Path, logged_in: HubDouble
) -> None:
    write_private_adapter(exported, a_private_state(private))
    with pytest.raises(CorruptFileError, match="is not the file that the manifest lists"):
        publish(dataclasses.replace(request_, exported=exported))
    seal(exported)
    read_artefact(exported)  # in form it is a shared adapter
    with pytest.raises(PrivateLeakError, match=r"adapter_model.safetensors of 1 client\)"):
        publish(dataclasses.replace(request_, exported=exported))
    assert logged_in.requests == []


def test_hub_gets_no_private_adapter_that_peft_wrote(
    request_: PublishRequest, run: Path, exported: Path, private: Path, logged_in: HubDouble
) -> None:
    opened, _ = open_run(run)
    state = a_private_state(private)
    save_both_with_peft(opened, state, exported)
    assert (exported / "private" / ADAPTER_FILE).is_file()
    with pytest.raises(PrivateLeakError, match=r"private/adapter_model.safetensors of 1 client"):
        publish(dataclasses.replace(request_, exported=exported))
    by_itself = exported / "private"
    for folder in (by_itself, exported / "shared"):
        with pytest.raises(ArtefactError, match=r"nothing was sent|has no pfm_manifest\.json"):
            publish(dataclasses.replace(request_, exported=folder))
    # With everything around it that belongs to a shared adapter.
    shutil.copytree(run / "shared_adapter", by_itself, dirs_exist_ok=True)
    for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
        both = exported / "again"
        save_both_with_peft(opened, state, both)
        shutil.copy(both / "private" / name, by_itself / name)
    seal(by_itself)
    with pytest.raises(PrivateLeakError, match=r"adapter_model\.safetensors"):
        publish(dataclasses.replace(request_, exported=by_itself))
    assert logged_in.requests == []


# --- the script -------------------------------------------------------------------------------


def test_hub_script_shows_what_it_would_push_and_sends_nothing(
    run: Path, logged_in: HubDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--runs", run.parent, "--repo", REPO, "--dry-run", "--tag", "v1", "--public")
    shown = run_script("push_adapter.py", *options, capsys=capsys)
    assert (shown.code, shown.err) == (0, "")
    planned = plan(request_of(run, REPO))
    for file in planned:
        (line,) = [line for line in shown.out.splitlines() if line.startswith(f"{file.name} ")]
        assert line.split()[1:] == [f"{file.size:,}", file.sha256]
    assert f"{sum(file.size for file in planned):,}" in shown.out
    assert f"to {REPO}, branch main, tag v1; public" in shown.out
    assert logged_in.requests == []


def test_hub_script_pushes_and_tells_where(
    run: Path, logged_in: HubDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--run", run, "--repo", REPO, "--public", "--revision", "trial")
    pushed = run_script("push_adapter.py", *options, capsys=capsys)
    repo = logged_in.repo(REPO)
    address = f"{logged_in.url}/{REPO}/tree/{repo.branches['trial']}"
    assert (pushed.code, pushed.out) == (0, f"pushed: {address}\n")
    assert not repo.private
    again = run_script("push_adapter.py", *options, capsys=capsys)
    assert (again.code, again.out) == (0, f"nothing new: {address}\n")


def test_hub_script_says_what_is_wrong(
    run: Path, hub: HubDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = run_script("push_adapter.py", "--run", run, "--repo", REPO, capsys=capsys)
    assert refused.code == 2
    assert "hf auth login" in refused.err
    none = run_script("push_adapter.py", "--runs", tmp_path, "--repo", REPO, capsys=capsys)
    assert none.code == 2
    assert f"no run in {tmp_path}" in none.err
    both = ("--repo", REPO, "--private", "--public")
    assert run_script("push_adapter.py", *both, capsys=capsys).code == 2
