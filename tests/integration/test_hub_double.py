"""The real client talks to the double of the Hub over HTTP: repos, pushes, pulls, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.hub_double import OTHER_TOKEN, READ_TOKEN, HubDouble
from tests.support.pushes import (
    FILES,
    LARGE,
    REPO,
    WEIGHTS,
    api,
    pull,
    push,
    sha256,
    stored,
    write_folder,
)
from tests.support.tiny_models import make_backbone


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is pushed."""
    return write_folder(tmp_path / "pushed", FILES)


@pytest.fixture
def pushed(hub: HubDouble, folder: Path) -> str:
    """The commit of a private repo that was pushed."""
    return push(hub, folder)


# --- repos and who may see them ---------------------------------------------------------------


def test_hub_creates_a_repo_once(hub: HubDouble) -> None:
    url = api(hub).create_repo(REPO)
    assert (url, url.repo_id) == (f"{hub.url}/{REPO}", REPO)
    assert api(hub).create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api(hub).create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api(hub).list_repo_files(REPO) == [".gitattributes"]
    assert [commit.message for commit in hub.repo(REPO).commits.values()] == ["initial commit"]


def test_hub_knows_who_calls_and_deletes_a_repo(hub: HubDouble) -> None:
    assert api(hub, READ_TOKEN).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api(hub, "hf_unheard_of").whoami()
    api(hub).create_repo(REPO)
    assert api(hub, None).repo_exists(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub, OTHER_TOKEN).delete_repo(REPO)
    api(hub).delete_repo(REPO)
    assert hub.repo_ids == []
    with pytest.raises(RepositoryNotFoundError):
        api(hub).delete_repo(REPO)


@pytest.mark.parametrize(("token", "status"), [(None, 401), (OTHER_TOKEN, 404)])
def test_hub_hides_a_private_repo(
    token: str | None, status: int, hub: HubDouble, pushed: str, tmp_path: Path
) -> None:
    calls = [
        lambda: api(hub, token).model_info(REPO),
        lambda: api(hub, token).hf_hub_download(REPO, "config.json", cache_dir=tmp_path),
        lambda: api(hub, token).snapshot_download(REPO, cache_dir=tmp_path),
        lambda: api(hub, token).list_repo_refs(REPO),
    ]
    for call in calls:
        with pytest.raises(RepositoryNotFoundError) as caught:
            call()
        assert caught.value.response.status_code == status
    assert api(hub, READ_TOKEN).model_info(REPO).private


def test_hub_refuses_an_unknown_token_even_for_a_public_repo(hub: HubDouble) -> None:
    api(hub).create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api(hub, "hf_unheard_of").model_info(REPO)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


@pytest.mark.parametrize("token", [READ_TOKEN, OTHER_TOKEN])
def test_hub_forbids_writing(token: str, hub: HubDouble, folder: Path) -> None:
    api(hub).create_repo(REPO)
    caller = api(hub, token)
    calls = [
        lambda: caller.create_repo("alice/new"),
        lambda: caller.upload_folder(repo_id=REPO, folder_path=folder),
        lambda: caller.create_tag(REPO, tag="v1"),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 403
    assert hub.repo_ids == [REPO]
    assert len(hub.repo(REPO).commits) == 1
    assert hub.asked("PUT") == []
    # The client asks whether the repo is there, and takes that for success.
    assert caller.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_hub_says_what_is_missing(hub: HubDouble, pushed: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api(hub).hf_hub_download("alice/other", "config.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api(hub).hf_hub_download(REPO, "config.json", revision="v9", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api(hub).snapshot_download(REPO, revision="0" * 40, cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        api(hub).hf_hub_download(REPO, "other.json", cache_dir=tmp_path)
    assert not api(hub).file_exists(REPO, "other.json")
    assert not api(hub).revision_exists(REPO, "v9")


# --- push and pull ----------------------------------------------------------------------------


def test_hub_returns_what_was_pushed(hub: HubDouble, pushed: str, tmp_path: Path) -> None:
    assert pull(hub, tmp_path / "cache") == FILES
    assert stored(hub) == FILES
    assert len(hub.asked("PUT", "/lfs/")) == len(LARGE)
    # Another origin has the large files, and never sees a token.
    downloads = hub.asked("GET", "/lfs/")
    assert len(downloads) == len(LARGE)
    assert not any(request.authorised for request in [*downloads, *hub.asked("PUT")])


def test_hub_describes_files(hub: HubDouble, pushed: str) -> None:
    hub.page_size = 2
    entries = {entry.path: entry for entry in api(hub).list_repo_tree(REPO, recursive=True)}
    assert set(entries) == {".gitattributes", "runs", "runs/a", *FILES}
    assert entries["head.safetensors"].lfs.sha256 == sha256(WEIGHTS[1:])
    top = [entry.path for entry in api(hub).list_repo_tree(REPO)]
    assert top == sorted([".gitattributes", "runs", *FILES.keys() - {"runs/a/notes.txt"}])
    below = list(api(hub).list_repo_tree(REPO, "runs/a"))
    assert [entry.path for entry in below] == ["runs/a/notes.txt"]
    paths = api(hub).get_paths_info(REPO, ["runs", "config.json", "absent"])
    assert [entry.path for entry in paths] == ["runs", "config.json"]
    info = api(hub).model_info(REPO, files_metadata=True)
    assert info.sha == pushed
    assert {file.rfilename: file.size for file in info.siblings}["config.json"] == 2


def test_hub_keeps_every_revision(
    hub: HubDouble, pushed: str, folder: Path, tmp_path: Path
) -> None:
    api(hub).create_tag(REPO, tag="v1", tag_message="first")
    api(hub).create_branch(REPO, branch="feature/x", revision="v1")
    (folder / "config.json").write_bytes(b'{"a": 1}')
    newest = api(hub).upload_folder(repo_id=REPO, folder_path=folder).oid
    on_branch = api(hub).upload_file(
        repo_id=REPO, path_or_fileobj=b"[]", path_in_repo="config.json", revision="feature/x"
    )
    wanted = {
        None: b'{"a": 1}', "main": b'{"a": 1}', newest: b'{"a": 1}',
        "v1": b"{}", pushed: b"{}",
        "feature/x": b"[]", on_branch.oid: b"[]",
    }  # fmt: skip
    for revision, config in wanted.items():
        cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        assert pull(hub, cache, revision) == {**FILES, "config.json": config}
    assert len(hub.asked("PUT")) == len(LARGE), "the large files were there already"


def test_hub_lists_tags_branches_and_commits(hub: HubDouble, pushed: str, folder: Path) -> None:
    api(hub).create_tag(REPO, tag="v1", revision=pushed[:7])
    with pytest.raises(HfHubHTTPError, match="exists already") as caught:
        api(hub).create_tag(REPO, tag="v1")
    assert caught.value.response.status_code == 409
    api(hub).create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(BadRequestError):
        api(hub).create_tag(REPO, tag="not a name")
    with pytest.raises(RevisionNotFoundError):
        api(hub).create_tag(REPO, tag="v2", revision="nowhere")
    refs = api(hub).list_repo_refs(REPO)
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [
        ("v1", "refs/tags/v1", pushed)
    ]
    assert [branch.name for branch in refs.branches] == ["main"]
    (folder / "config.json").write_bytes(b"[]")
    hub.page_size = 1
    api(hub).upload_folder(repo_id=REPO, folder_path=folder, commit_message="again")
    commits = api(hub).list_repo_commits(REPO)
    assert [commit.title for commit in commits] == ["again", "push", "initial commit"]
    assert [commit.authors for commit in commits] == [["alice"], ["alice"], ["system"]]
    assert len(api(hub).list_repo_commits(REPO, revision="v1")) == 2
    api(hub).delete_tag(REPO, tag="v1")
    assert api(hub).list_repo_refs(REPO).tags == []
    with pytest.raises(RevisionNotFoundError):
        api(hub).delete_tag(REPO, tag="v1")


def test_hub_deletes_by_pattern(hub: HubDouble, pushed: str, tmp_path: Path) -> None:
    new = write_folder(tmp_path / "new", {"adapter_model.safetensors": b"\0" * 10})
    api(hub).upload_folder(
        repo_id=REPO, folder_path=new, delete_patterns=["*.safetensors", "runs/*"]
    )
    kept = {name: FILES[name] for name in ("README.md", "config.json")}
    assert pull(hub, tmp_path / "cache") == {**kept, "adapter_model.safetensors": b"\0" * 10}
    assert pull(hub, tmp_path / "cache", pushed) == FILES


def test_hub_deletes_files_and_folders(hub: HubDouble, pushed: str) -> None:
    api(hub).delete_folder("runs", REPO)
    api(hub).delete_file("config.json", REPO)
    assert set(hub.repo(REPO).files()) == {".gitattributes", "README.md", *LARGE}
    with pytest.raises(RemoteEntryNotFoundError):
        api(hub).delete_file("config.json", REPO)


def test_hub_makes_no_commit_when_nothing_changed(
    hub: HubDouble, pushed: str, folder: Path
) -> None:
    assert api(hub).upload_folder(repo_id=REPO, folder_path=folder).oid == pushed
    assert len(hub.asked("POST", "/commit/")) == 1


def test_hub_refuses_a_commit_upon_an_older_parent(hub: HubDouble, pushed: str) -> None:
    first = next(iter(hub.repo(REPO).commits))
    change = {"repo_id": REPO, "path_or_fileobj": b"new", "path_in_repo": "config.json"}
    with pytest.raises(HfHubHTTPError, match="commit has happened since") as caught:
        api(hub).upload_file(**change, parent_commit=first)
    assert caught.value.response.status_code == 412
    made = api(hub).upload_file(**change, parent_commit=pushed)
    assert hub.repo(REPO).at("main").oid == made.oid


def test_hub_looks_at_the_card(hub: HubDouble) -> None:
    api(hub).create_repo(REPO)
    upload = {"repo_id": REPO, "path_in_repo": "README.md"}
    with pytest.raises(ValueError, match="Invalid metadata"):
        api(hub).upload_file(**upload, path_or_fileobj=b"---\na: [\n---\n")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api(hub).upload_file(**upload, path_or_fileobj=b"# no metadata")


# --- libraries upon the client ----------------------------------------------------------------


def test_hub_adapter_is_loaded_by_peft(hub: HubDouble, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_backbone().model, config)
    adapted.save_pretrained(tmp_path)
    api(hub).create_repo(REPO)
    api(hub).upload_folder(repo_id=REPO, folder_path=tmp_path, allow_patterns="adapter_*")
    loaded = PeftModel.from_pretrained(make_backbone().model, REPO)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits, rtol=0, atol=0)
    assert len(hub.asked("GET", "adapter_model.safetensors")) == 1


def test_hub_model_is_loaded_by_transformers(hub: HubDouble, tmp_path: Path) -> None:
    model = make_backbone().model
    model.save_pretrained(tmp_path)
    api(hub).create_repo(REPO)
    api(hub).upload_folder(repo_id=REPO, folder_path=tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(REPO).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_hub_serves_another_process(hub: HubDouble, pushed: str) -> None:
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'config.json'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **hub.environ(READ_TOKEN)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    got = Path(done.stdout.strip())
    assert got.is_relative_to(hub.home)
    assert got.read_bytes() == FILES["config.json"]
