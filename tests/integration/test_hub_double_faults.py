"""The real client when the double of the Hub lets things go wrong, and the double by itself."""

import os
import urllib.error
import urllib.request
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, file_exists, hf_api
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.support.hub_double import WRITE_TOKEN, HubDouble
from tests.support.hub_double.fixture import talk_to
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

TRIES = 6  # the client's first, and its five retries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is pushed."""
    return write_folder(tmp_path / "pushed", FILES)


@pytest.fixture
def pushed(hub: HubDouble, folder: Path) -> str:
    """The commit of a private repo that was pushed."""
    return push(hub, folder)


# --- what goes wrong --------------------------------------------------------------------------


def test_hub_keeps_what_an_interrupted_push_uploaded(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    api(hub).create_repo(REPO)
    cut_off = sha256(LARGE["head.safetensors"])
    hub.drop_next("PUT", cut_off, times=TRIES, after_bytes=1000)
    with pytest.raises(RuntimeError, match=r"uploading 'head\.safetensors'"):
        api(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.waits == [1, 2, 4, 8, 8]
    assert len(hub.repo(REPO).commits) == 1, "nothing is half committed"
    before = len(hub.asked("PUT"))
    api(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert [cut_off in request.path for request in hub.asked("PUT")[before:]] == [True]
    assert pull(hub, tmp_path) == FILES


def test_hub_lets_an_upload_succeed_at_the_second_try(hub: HubDouble, folder: Path) -> None:
    api(hub).create_repo(REPO)
    hub.fail_next("PUT", "/lfs/", 503)
    hub.drop_next("POST", "/preupload/")
    hub.fail_next("POST", "/objects/batch", 429, headers={"Retry-After": "7"})
    api(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert sorted(hub.waits) == [1, 1, 8]
    assert stored(hub) == FILES


def test_hub_may_commit_though_the_answer_is_lost(hub: HubDouble, folder: Path) -> None:
    api(hub).create_repo(REPO)
    hub.drop_next("POST", "/commit/main", done=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        api(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert stored(hub) == FILES
    made = api(hub).upload_folder(repo_id=REPO, folder_path=folder).oid
    assert (made, len(hub.repo(REPO).commits)) == (hub.repo(REPO).at("main").oid, 2)


def test_hub_download_is_resumed_where_it_was_cut(
    hub: HubDouble, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client drops what it has of a chunk, and a chunk is 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    name = "adapter_model.safetensors"
    hub.drop_next("GET", name, after_bytes=4500)
    got = api(hub).hf_hub_download(REPO, name, cache_dir=tmp_path)
    assert Path(got).read_bytes() == WEIGHTS
    requests = hub.asked("GET", name)
    assert [(request.range, request.status) for request in requests] == [
        ("", 200),
        ("bytes=4000-", 206),
    ]


@pytest.mark.parametrize(
    ("reset", "tries", "error"),
    [(False, TRIES, httpx2.RemoteProtocolError), (True, 1, httpx2.ReadError)],
)
def test_hub_download_that_is_cut_leaves_no_file(
    reset: bool, tries: int, error: type[Exception], hub: HubDouble, pushed: str, tmp_path: Path
) -> None:
    name = "adapter_model.safetensors"
    hub.drop_next("GET", name, times=tries, after_bytes=4500, reset=reset)
    with pytest.raises(error):
        api(hub).hf_hub_download(REPO, name, cache_dir=tmp_path / "cache")
    assert len(hub.asked("GET", name)) == tries
    assert list(tmp_path.glob("cache/*/blobs/*")) == []
    got = api(hub).hf_hub_download(REPO, name, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == WEIGHTS


def test_hub_that_is_away_leaves_the_cache(hub: HubDouble, pushed: str, tmp_path: Path) -> None:
    assert pull(hub, tmp_path) == FILES
    hub.close()
    assert pull(hub, tmp_path) == FILES
    with pytest.raises(LocalEntryNotFoundError):
        pull(hub, tmp_path / "other")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_hub_client_takes_corrupt_files_and_finds_them_when_asked(
    name: str, hub: HubDouble, pushed: str, tmp_path: Path
) -> None:
    hub.corrupt(REPO, name)
    got = pull(hub, tmp_path)
    assert [path for path in FILES if got[path] != FILES[path]] == [name]
    assert len(got[name]) == len(FILES[name])
    verified = api(hub).verify_repo_checksums(REPO, cache_dir=tmp_path)
    assert [mismatch["path"] for mismatch in verified.mismatches] == [name]


# --- the double itself ------------------------------------------------------------------------


def status_of(method: str, url: str, body: bytes = b"", **headers: str) -> int:
    request = urllib.request.Request(url, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_hub_writes_down_what_it_does_not_know(hub: HubDouble) -> None:
    assert status_of("GET", f"{hub.url}/api/spaces/alice/tiny") == 404
    assert hub.unknown == ["GET /api/spaces/alice/tiny"]
    hub.unknown.clear()


def test_hub_reports_faults_that_were_never_met(hub: HubDouble) -> None:
    hub.fail_next("GET", "/never", 500, times=2)
    assert status_of("GET", f"{hub.url}/never") == 500
    assert [fault.times for fault in hub.faults_left()] == [1]
    hub.clear_faults()


def test_hub_storage_takes_only_what_was_declared(hub: HubDouble, pushed: str) -> None:
    granted = hub.asked("PUT", sha256(WEIGHTS))[0].path
    right = hub.storage_url + granted
    assert status_of("PUT", right, WEIGHTS) == 200
    in_chunks = httpx2.put(right, content=iter([WEIGHTS[:9], WEIGHTS[9:]]))
    assert (in_chunks.request.headers["Transfer-Encoding"], in_chunks.status_code) == (
        "chunked",
        200,
    )
    assert status_of("PUT", right, WEIGHTS[:-1]) == 400
    assert status_of("PUT", right, WEIGHTS[::-1]) == 400
    assert status_of("PUT", right, WEIGHTS, Authorization=f"Bearer {WRITE_TOKEN}") == 400
    assert status_of("PUT", right[:-1], WEIGHTS) == 403
    assert status_of("GET", right) == 403, "a link is for one method"
    assert stored(hub) == FILES


def test_hub_sends_ranges(hub: HubDouble) -> None:
    api(hub).create_repo(REPO)
    api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"0123456789", path_in_repo="digits.txt")
    wanted = {
        "bytes=2-": (206, b"23456789", "bytes 2-9/10"),
        "bytes=2-3": (206, b"23", "bytes 2-3/10"),
        "bytes=8-20": (206, b"89", "bytes 8-9/10"),
        "bytes=-3": (206, b"789", "bytes 7-9/10"),
        "bytes=10-": (416, b"", "bytes */10"),
    }
    for asked, (status, body, content_range) in wanted.items():
        got = httpx2.get(f"{hub.url}/{REPO}/resolve/main/digits.txt", headers={"Range": asked})
        assert (got.status_code, got.content) == (status, body)
        assert got.headers["Content-Range"] == content_range


def test_hub_fixture_leaves_the_client_as_it_was() -> None:
    names = ("ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH")
    before = [getattr(constants, name) for name in names], hf_api.api.endpoint, dict(os.environ)
    with HubDouble() as double, pytest.MonkeyPatch.context() as patch:
        talk_to(double, patch)
        assert HfApi().endpoint == file_exists.__self__.endpoint == double.url
        assert not constants.is_offline_mode()
    after = [getattr(constants, name) for name in names], hf_api.api.endpoint, dict(os.environ)
    assert after == before
