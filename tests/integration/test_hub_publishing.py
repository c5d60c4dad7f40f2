"""A run's shared adapter is pushed whole and checked; what is private is never pushed."""

import dataclasses
import hashlib
import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pfm_llm import hub as the_hub
from pfm_llm import signing
from pfm_llm.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    HEAD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TRAINING_CONFIG_FILE,
    Parent,
    read_artefact,
)
from pfm_llm.assembly import RunFolders, assemble, load_corpus
from pfm_llm.config import load_config
from pfm_llm.errors import (
    ArtefactError,
    ConfigError,
    CorruptFileError,
    HubError,
    PfmError,
    PrivateLeakError,
    StorageError,
)
from pfm_llm.experiment import run_experiment
from pfm_llm.private_store import PrivateStore
from pfm_llm.publishing import PublishRequest, plan, publish, stage
from tests.hub_double import OWNER, WRITE_TOKEN, HubDouble
from tests.integration.exports import (
    a_private_state,
    change_json,
    change_tensors,
    change_yaml,
    copy_of,
    manifest_of,
    numbers_as,
    put_into,
    save_both_with_peft,
    seal,
    some_b,
    state_files,
    write_private_adapter,
)
from tests.integration.pushes import without_the_hubs
from tests.integration.scripts import run_script
from tests.integration.tiny import Tiny, alone

REPO = f"{OWNER}/films"
FOLDED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a private state of every client."""
    output = tmp_path_factory.mktemp("publishing") / "runs"
    return run_experiment(tiny.config(output, evaluation__every=2))


@pytest.fixture
def private(run: Path) -> Path:
    return RunFolders.of(run).private


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's export, to be changed."""
    return copy_of(run / "shared_adapter", tmp_path / "exported")


@pytest.fixture
def request_(run: Path) -> PublishRequest:
    return PublishRequest(run=run, repo=REPO)


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


# --- what is staged ---------------------------------------------------------------------------


def test_stages_what_the_manifest_lists_and_nothing_else(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    (exported / SIGNATURE_FILE).write_bytes(b"of another version")
    staged = stage(exported, tmp_path / "staged", private)
    names = {*manifest_of(exported).files, MANIFEST_FILE, CARD_FILE}
    found = {name: content for name, (content, _) in state_files(staged.folder).items()}
    assert found == {name: (exported / name).read_bytes() for name in names}
    assert {"plots/loss.png", "prompts/next_item.v1.toml", HEAD_FILE} < names
    assert staged.folder == tmp_path / "staged"


def test_stages_into_an_empty_folder_only(exported: Path, private: Path, tmp_path: Path) -> None:
    into = tmp_path / "staged"
    into.mkdir()
    stage(exported, into, private)
    before = state_files(into)
    with pytest.raises(ArtefactError, match="is not empty"):
        stage(exported, into, private)
    assert state_files(into) == before


def test_without_the_private_store_nothing_is_published(
    run: Path, exported: Path, tmp_path: Path, logged_in: HubDouble
) -> None:
    with pytest.raises(ArtefactError, match=r"no private store at .*elsewhere.*nothing was sent"):
        stage(exported, tmp_path / "staged", tmp_path / "elsewhere")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    with pytest.raises(ArtefactError, match=r"no private store at .*moved\.private"):
        publish(PublishRequest(moved, REPO))
    with pytest.raises(ConfigError, match="cannot read config"):
        publish(PublishRequest(tmp_path / "no_run", REPO))
    assert logged_in.requests == []


def test_a_run_without_private_adapters_needs_no_private_store(
    tiny: Tiny, tmp_path: Path, logged_in: HubDouble
) -> None:
    run = run_experiment(tiny.config(tmp_path / "runs", adapters__private__enabled=False))
    shutil.rmtree(RunFolders.of(run).private)
    assert publish(PublishRequest(run, REPO)).pushed.changed
    assert "private_basis.safetensors" not in on_hub(logged_in)


def test_a_shared_basis_is_published(tiny: Tiny, tmp_path: Path, logged_in: HubDouble) -> None:
    run = run_experiment(tiny.config(tmp_path / "runs", adapters__private__kind="shared_basis"))
    publish(PublishRequest(run, REPO))
    assert "private_basis.safetensors" in on_hub(logged_in)
    folder = copy_of(run / "shared_adapter", tmp_path / "copy")
    change_tensors(folder, "private_basis.safetensors", lambda t: t.popitem())
    seal(folder)
    with pytest.raises(ArtefactError, match=r"private_basis.safetensors lacks basis\."):
        publish(PublishRequest(run, REPO), folder)
    (folder / "private_basis.safetensors").unlink()
    seal(folder, names=[n for n in manifest_of(folder).files if "basis" not in n])
    with pytest.raises(ArtefactError, match=r"private_basis.safetensors is missing"):
        publish(PublishRequest(run, REPO), folder)


# --- what is pushed ---------------------------------------------------------------------------


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
    assert (repo.private, repo.tags) == (True, {"v1": published.pushed.revision})
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
    assert again.pushed == dataclasses.replace(first.pushed, changed=False)
    assert again.manifest == first.manifest
    assert num_sent(logged_in) == sent
    publish(dataclasses.replace(request_, tag="v1"))
    assert logged_in.repo(REPO).tags == {"v1": first.pushed.revision}
    assert num_sent(logged_in) == sent + 1


def test_hub_keeps_a_card_that_was_edited_there(
    request_: PublishRequest, logged_in: HubDouble
) -> None:
    publish(request_)
    card = b"---\nlicense: mit\n---\n# Mine\n"
    the_api = the_hub.calls.hub_api()
    the_api.upload_file(repo_id=REPO, path_or_fileobj=card, path_in_repo=CARD_FILE)
    assert not publish(request_).pushed.changed
    assert on_hub(logged_in)[CARD_FILE] == card


def test_hub_versions_are_linked(
    request_: PublishRequest, exported: Path, logged_in: HubDouble
) -> None:
    source = Parent(relation="trained_from", manifest_sha256="a" * 64, repo="bob/other")
    seal(exported, parents=(source,))
    first = publish(request_, exported)
    assert first.manifest.parents == (source,)
    seal(exported, round=8)
    second = publish(request_, exported)
    link = Parent(
        relation="previous",
        manifest_sha256=sha256(on_hub(logged_in, first.pushed.revision)[MANIFEST_FILE]),
        repo=REPO,
        revision=first.pushed.revision,
    )
    assert second.manifest.parents == (link, source)
    assert on_hub(logged_in)[MANIFEST_FILE] == second.manifest.to_bytes()
    assert the_hub.head_manifest(REPO) == (
        second.manifest,
        sha256(second.manifest.to_bytes()),
        second.pushed.revision,
    )
    sent = num_sent(logged_in)
    assert not publish(request_, exported).pushed.changed, "but for its parents it is there"
    assert num_sent(logged_in) == sent
    assert the_hub.pull(REPO).manifest == second.manifest, "all files are as it lists them"


def test_hub_branch_gets_its_own_version(
    request_: PublishRequest, exported: Path, logged_in: HubDouble
) -> None:
    first = publish(request_)
    seal(exported, round=8)
    on_branch = dataclasses.replace(request_, revision="trial")
    second = publish(on_branch, exported)
    assert second.manifest.parents[0].revision == first.pushed.revision
    branches = logged_in.repo(REPO).branches
    assert branches == {"main": first.pushed.revision, "trial": second.pushed.revision}


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
    assert later.pushed.changed
    assert later.manifest == unsigned.manifest
    assert signing.verify(files[MANIFEST_FILE], files[SIGNATURE_FILE], public) == public
    assert not publish(signed).pushed.changed
    assert not publish(request_).pushed.changed, "a signature that is there stays"
    seal(exported, round=8)
    publish(signed, exported)
    files = on_hub(logged_in)
    assert signing.verify(files[MANIFEST_FILE], files[SIGNATURE_FILE], public) == public
    seal(exported, round=9)
    publish(request_, exported)
    assert SIGNATURE_FILE not in on_hub(logged_in), "it is not of this version"
    with pytest.raises(StorageError, match="cannot read the signing key"):
        plan(dataclasses.replace(request_, signing_key=tmp_path / "absent.pem"))


def test_hub_card_tells_how_to_load_and_is_read_by_the_client(
    request_: PublishRequest, run: Path, logged_in: HubDouble
) -> None:
    publish(request_)
    text = on_hub(logged_in)[CARD_FILE].decode()
    assert f"PeftModel.from_pretrained(base, '{REPO}')" in text
    assert f"RecommenderModel.from_pretrained('{REPO}'" in text
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


# --- the script -------------------------------------------------------------------------------


def test_hub_script_shows_what_it_would_push_and_sends_nothing(
    run: Path, logged_in: HubDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--runs", run.parent, "--repo", REPO, "--dry-run", "--tag", "v1", "--public")
    shown = run_script("push_adapter.py", *options, capsys=capsys)
    assert (shown.code, shown.err) == (0, "")
    planned = plan(PublishRequest(run, REPO))
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


# --- what is private --------------------------------------------------------------------------


Hide = Callable[[Path, bytes], None]


def in_the_head(folder: Path, content: bytes) -> None:
    change_tensors(folder, HEAD_FILE, lambda t: put_into(t["normaliser.basis"], content))


def in_the_adapter(folder: Path, content: bytes) -> None:
    change_tensors(folder, ADAPTER_FILE, lambda t: put_into(next(iter(t.values())), content))


def in_a_plot(folder: Path, content: bytes) -> None:
    plot = folder / "plots" / "loss.png"
    plot.write_bytes(plot.read_bytes() + b"x" + content)


def as_hex_in_the_config(folder: Path, content: bytes) -> None:
    change_yaml(folder, TRAINING_CONFIG_FILE, lambda tree: tree.update(note=content.hex()))


@pytest.mark.parametrize("dtype", FOLDED_DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
@pytest.mark.parametrize(
    ("hide", "file"),
    [
        (in_the_head, HEAD_FILE),
        (in_the_adapter, ADAPTER_FILE),
        (in_a_plot, "plots/loss.png"),
        (as_hex_in_the_config, TRAINING_CONFIG_FILE),
    ],
)
def test_a_private_tensor_in_a_file_is_found(
    hide: Hide,
    file: str,
    transposed: bool,
    dtype: torch.dtype,
    exported: Path,
    private: Path,
    tmp_path: Path,
) -> None:
    secret = some_b(a_private_state(private))
    hide(exported, numbers_as(secret.T if transposed else secret, dtype))
    seal(exported)
    with pytest.raises(PrivateLeakError) as caught:
        stage(exported, tmp_path / "staged", private)
    assert f"({file} of 1 client)" in str(caught.value)
    assert "nothing was sent" in str(caught.value)
    assert not (tmp_path / "staged").exists()


def numbers_in_json(folder: Path, numbers: list[float]) -> None:
    change_json(folder, ITEM_KEYS_FILE, lambda keys: keys + numbers)


def numbers_in_yaml(folder: Path, numbers: list[float]) -> None:
    change_yaml(folder, TRAINING_CONFIG_FILE, lambda tree: tree.update(weights=numbers))


def numbers_in_the_card(folder: Path, numbers: list[float]) -> None:
    card = folder / CARD_FILE
    card.write_text(card.read_text() + " | ".join(f"{number:.4g}" for number in numbers))


@pytest.mark.parametrize("write", [numbers_in_json, numbers_in_yaml, numbers_in_the_card])
def test_private_numbers_that_are_spelt_out_are_found(
    write: Callable[[Path, list[float]], None], exported: Path, private: Path, tmp_path: Path
) -> None:
    write(exported, some_b(a_private_state(private)).reshape(-1).tolist())
    seal(exported)
    with pytest.raises(PrivateLeakError, match="of 1 client"):
        stage(exported, tmp_path / "staged", private)


def test_every_version_of_every_client_is_looked_for(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    store, num_versions = PrivateStore(private), 0
    for client_id in store.client_ids():
        states = [store.load(client_id, version) for version in store.versions(client_id)]
        for number, state in enumerate([*states, store.load_personalised(client_id)]):
            folder = copy_of(exported, tmp_path / f"{client_id}-{number}")
            assert state is not None
            in_a_plot(folder, numbers_as(some_b(state), torch.float32))
            seal(folder)
            with pytest.raises(PrivateLeakError):
                stage(folder, tmp_path / "staged", private)
            num_versions += 1
        if num_versions > 8:
            break
    assert len(store.client_ids()) == 24
    assert any(store.versions(client_id) for client_id in store.client_ids())


def test_hub_gets_no_private_adapter_under_the_shared_one_s_names(
    request_: PublishRequest, exported: Path, private: Path, logged_in: HubDouble
) -> None:
    write_private_adapter(exported, a_private_state(private))
    with pytest.raises(CorruptFileError, match="is not the file that the manifest lists"):
        publish(request_, exported)
    seal(exported)
    read_artefact(exported)  # in form it is a shared adapter
    with pytest.raises(PrivateLeakError, match=r"adapter_model.safetensors of 1 client\)"):
        publish(request_, exported)
    assert logged_in.requests == []


def test_hub_gets_no_private_adapter_that_peft_wrote(
    request_: PublishRequest, run: Path, exported: Path, private: Path, logged_in: HubDouble
) -> None:
    config = load_config(run / "config.yaml")
    assembly = assemble(config, load_corpus(config), RunFolders.of(run), alone())
    state = a_private_state(private)
    save_both_with_peft(assembly, state, exported)
    assert (exported / "private" / ADAPTER_FILE).is_file()
    with pytest.raises(PrivateLeakError, match=r"private/adapter_model.safetensors of 1 client"):
        publish(request_, exported)
    by_itself = exported / "private"
    for folder in (by_itself, exported / "shared"):
        with pytest.raises(ArtefactError, match=r"nothing was sent|has no pfm_manifest\.json"):
            publish(request_, folder)
    # With everything around it that belongs to a shared adapter.
    shutil.copytree(run / "shared_adapter", by_itself, dirs_exist_ok=True)
    for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
        assembly_model = exported / "again"
        save_both_with_peft(assembly, state, assembly_model)
        shutil.copy(assembly_model / "private" / name, by_itself / name)
    seal(by_itself)
    with pytest.raises(PrivateLeakError, match=r"adapter_model\.safetensors"):
        publish(request_, by_itself)
    assert logged_in.requests == []


def test_a_damaged_private_state_stops_it_since_nothing_can_be_compared(
    run: Path, exported: Path, private: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "tiny.private"
    shutil.copytree(private, damaged)
    file = next(damaged.glob("clients/*/personalised.*"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match="the private state of client"):
        stage(exported, tmp_path / "staged", damaged)
    assert not (tmp_path / "staged").exists()


# --- what has no place ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["notes.txt", "shared/adapter_model.safetensors", ".peft/x", "plots/deeper/a.png"]
)
def test_a_file_that_the_manifest_does_not_list_is_refused(
    name: str, exported: Path, private: Path, tmp_path: Path
) -> None:
    (exported / name).parent.mkdir(parents=True, exist_ok=True)
    (exported / name).write_bytes(b"public")
    with pytest.raises(ArtefactError, match=rf"holds {name}, which has no place") as caught:
        stage(exported, tmp_path / "staged", private)
    assert not isinstance(caught.value, PrivateLeakError)
    assert not (tmp_path / "staged").exists()


def test_a_manifest_cannot_list_what_has_no_place(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    (exported / "notes.txt").write_bytes(b"public")
    seal(exported, ("notes.txt",))
    with pytest.raises(ArtefactError, match=r"notes.txt has no place"):
        stage(exported, tmp_path / "staged", private)


@pytest.mark.parametrize("name", [HEAD_FILE, "plots", CARD_FILE, MANIFEST_FILE])
def test_links_are_not_followed(name: str, exported: Path, private: Path, tmp_path: Path) -> None:
    (exported / name).rename(tmp_path / "elsewhere")
    (exported / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PfmError, match=r"is a link|cannot read"):
        stage(exported, tmp_path / "staged", private)
    link = tmp_path / "link"
    link.symlink_to(exported)
    with pytest.raises(ArtefactError, match="no exported adapter"):
        stage(link, tmp_path / "staged", private)
    assert not (tmp_path / "staged").exists()


def test_hub_run_may_be_named_by_a_link(
    run: Path, private: Path, tmp_path: Path, logged_in: HubDouble
) -> None:
    (tmp_path / "latest").symlink_to(run)
    folder = copy_of(run / "shared_adapter", tmp_path / "copy")
    in_a_plot(folder, numbers_as(some_b(a_private_state(private)), torch.float32))
    seal(folder)
    request = PublishRequest(tmp_path / "latest", REPO)
    with pytest.raises(PrivateLeakError):
        publish(request, folder)
    assert publish(request).pushed.changed


def adapter_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder, ADAPTER_CONFIG_FILE, lambda t: t.update(changes))


def training_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_yaml(folder, TRAINING_CONFIG_FILE, lambda t: t.update(changes))


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, name, change)


def based_on(base: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        adapter_config(base_model_name_or_path=base)(folder)
        named = manifest_of(folder).base.model_copy(update={"name": base})
        seal(folder, base=named)

    return change


def text_file(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def extra(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda t: t.update({name: torch.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(based_on("/home/me/base"), "a path of this machine", id="absolute base"),
        pytest.param(based_on("~/base"), "a path of this machine", id="home base"),
        pytest.param(based_on("./base"), "a base on this machine", id="relative base"),
        pytest.param(based_on("a/b/base"), "a base on this machine", id="deep base"),
        pytest.param(based_on("pfm_llm/data"), "a base on this machine", id="folder here"),
        pytest.param(adapter_config(base_model_name_or_path="x/y"), "base_model_name", id="base"),
        pytest.param(adapter_config(modules_to_save=["lm_head"]), "modules_to_save", id="modules"),
        pytest.param(adapter_config(r=3), "r: 3, expected 2", id="rank"),
        pytest.param(adapter_config(lora_alpha=5), "lora_alpha: 5, expected 4", id="alpha"),
        pytest.param(adapter_config(peft_type="LOHA"), "peft_type: 'LOHA'", id="no LoRA"),
        pytest.param(adapter_config(use_dora=True), "use_dora", id="DoRA"),
        pytest.param(adapter_config(bias="all"), "bias: 'all'", id="bias"),
        pytest.param(adapter_config(target_modules=["q_proj"]), "other modules", id="targets"),
        pytest.param(adapter_config(target_modules=".*"), "other modules", id="expression"),
        pytest.param(adapter_config(layers_to_transform=[0, 1]), "other modules", id="layers"),
        pytest.param(adapter_config(layers_to_transform=None), "other modules", id="all layers"),
        pytest.param(adapter_config(revision="/data/x"), "path of this machine at revi", id="path"),
        pytest.param(text_file(ADAPTER_CONFIG_FILE, b"[]"), "holds no settings", id="no tree"),
        pytest.param(text_file(ADAPTER_CONFIG_FILE, b"{x: ["), "cannot be read", id="no JSON"),
        pytest.param(
            training_config(data={"source": "/home/me/x.csv"}), r"at data\.source: /home", id="data"
        ),
        pytest.param(
            training_config(deep=[{"a": ["C:\\data"]}]), r"at deep\.a: C:", id="Windows path"
        ),
        pytest.param(text_file(TRAINING_CONFIG_FILE, b"a: [\xff"), "cannot be read", id="no YAML"),
        pytest.param(text_file(CARD_FILE, b"\xff"), "README.md cannot be read", id="no text"),
        pytest.param(tensors(ADAPTER_FILE, extra("base_model.model.x.weight")), "LoRA", id="more"),
        pytest.param(
            tensors(ADAPTER_FILE, extra("base_model.model.lm_head.lora_A.weight")),
            "holds lora.lm_head.A, other than",
            id="other module",
        ),
        pytest.param(tensors(ADAPTER_FILE, lambda t: t.popitem()), "lacks lora", id="module lost"),
        pytest.param(
            tensors(ADAPTER_FILE, lambda t: t.update({k: v[:1] for k, v in t.items() if "A" in k})),
            r"as float32\[1, .*expected float32\[2, any\]",
            id="rank of tensors",
        ),
        pytest.param(
            tensors(ADAPTER_FILE, lambda t: t.update({k: v.half() for k, v in t.items()})),
            "as float16",
            id="dtype",
        ),
        pytest.param(tensors(HEAD_FILE, extra("head.extra")), "holds head.extra", id="head"),
        pytest.param(tensors(HEAD_FILE, extra("private.head.B")), "holds private", id="private"),
        pytest.param(tensors(HEAD_FILE, lambda t: t.pop("head.item_bias")), "lacks", id="no bias"),
        pytest.param(
            tensors(HEAD_FILE, lambda t: t.update({"head.item_ids": torch.ones(9, 4)})),
            r"float32\[9, 4\], expected float32\[30, 4\]",
            id="items",
        ),
        pytest.param(text_file(ITEM_KEYS_FILE, json.dumps(["Toy Story"] * 30).encode()), "keys",
                     id="titles for keys"),
        pytest.param(text_file("plots/loss.png", b"#!/bin/sh"), "is no PNG", id="no image"),
    ],
)  # fmt: skip
def test_what_a_shared_adapter_does_not_hold_is_refused(
    change: Callable[[Path], None], message: str, exported: Path, private: Path, tmp_path: Path
) -> None:
    change(exported)
    seal(exported)
    with pytest.raises(PfmError, match=message) as caught:
        stage(exported, tmp_path / "staged", private)
    assert not isinstance(caught.value, PrivateLeakError)
    assert not (tmp_path / "staged").exists()


def test_another_prompt_than_the_manifest_s_is_refused(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    seal(exported, prompt_sha256="0" * 64)
    with pytest.raises(ArtefactError, match="not the one that was trained with"):
        stage(exported, tmp_path / "staged", private)


def test_more_than_tensors_in_a_header_is_refused(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(exported / HEAD_FILE), exported / HEAD_FILE, {"note": "anything"})
    seal(exported)
    with pytest.raises(ArtefactError, match="more than tensors in its header"):
        stage(exported, tmp_path / "staged", private)


def test_a_folder_that_is_no_export_is_refused(run: Path, private: Path, tmp_path: Path) -> None:
    client = next((private / "clients").iterdir())
    for folder in (client, run / "server", run, tmp_path / "absent"):
        with pytest.raises(ArtefactError):
            stage(folder, tmp_path / "staged", private)
    with pytest.raises(PrivateLeakError):
        stage(client, tmp_path / "staged", private)


def test_the_export_of_a_run_shows_no_path_of_this_machine(run: Path) -> None:
    tree = yaml.safe_load((run / "shared_adapter" / TRAINING_CONFIG_FILE).read_text())
    assert tree["data"]["source"] == "interactions.csv"
    assert str(run.parent) not in (run / "shared_adapter" / CARD_FILE).read_text()
