"""Publishing by who may not, and when the Hub or the way to it fails."""

import json

import httpx2
import pytest
from huggingface_hub import constants

from pfm_llm.base.errors import HubError
from pfm_llm.publish import hub as the_hub
from pfm_llm.publish.artefact import CARD_FILE, Artefact
from pfm_llm.publish.hub import calls, pull
from tests.support.hub_double import OTHER_TOKEN, READ_TOKEN, HubDouble
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
)

__all__ = ["logged_in", "small", "two"]
pytestmark = pytest.mark.usefixtures("logged_in")
NEVER = "hf_unheard_of"


# --- who may ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "nobody is logged in.*hf auth login.*HF_TOKEN"),
        (NEVER, "does not know the token.*hf auth login"),
        (READ_TOKEN, "the token may not do this: it takes one with write access to alice"),
        (OTHER_TOKEN, "write access to alice"),
    ],
)
@pytest.mark.parametrize("there", ["nothing", "private", "public"])
def test_hub_refuses_a_push_by_who_may_not(
    there: str,
    token: str,
    message: str,
    hub: HubDouble,
    small: Artefact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if there != "nothing":
        api(hub).create_repo(REPO, private=there == "private")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"cannot push to {REPO}: .*{message}"):
        push(small)
    assert hub.asked("PUT") == []
    assert hub.repo_ids == ([] if there == "nothing" else [REPO])
    assert there == "nothing" or num_commits(hub) == 0
    assert hub.waits == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "nobody is logged in, and without a token a private repository looks like none"),
        (NEVER, "does not know the token"),
        (OTHER_TOKEN, "there is no such repository, or it is private and not yours"),
    ],
)
def test_hub_hides_a_private_repo_from_a_pull(
    token: str, message: str, hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(small)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"cannot pull {REPO}: .*{message}"):
        pull(REPO)
    with pytest.raises(HubError, match=message):
        the_hub.list_commits(REPO)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert pull(REPO).manifest == small.manifest


# --- what goes wrong while pushing ------------------------------------------------------------


def test_hub_keeps_what_a_broken_push_uploaded(hub: HubDouble, small: Artefact) -> None:
    cut_off = small.manifest.files["recommender_head.safetensors"]
    hub.drop_next("PUT", cut_off, times=6, after_bytes=100)
    with pytest.raises(HubError, match=r"cannot be reached.*what was uploaded is kept"):
        push(small)
    assert num_commits(hub) == 0, "nothing is half published"
    before = len(hub.asked("PUT"))
    assert push(small).changed
    assert [cut_off in request.path for request in hub.asked("PUT")[before:]] == [True]
    assert stored(hub) == contents(small.folder)


def test_hub_upload_that_is_reset_is_tried_again(hub: HubDouble, small: Artefact) -> None:
    for _ in range(2):
        hub.drop_next("PUT", "/lfs/", after_bytes=100, reset=True)
    assert push(small).changed
    assert stored(hub) == contents(small.folder)


@pytest.mark.parametrize("times", [1, 2])
def test_hub_commit_whose_answer_was_lost_is_not_made_twice(
    times: int, hub: HubDouble, small: Artefact
) -> None:
    hub.drop_next("POST", "/commit/main", times=times - 1)
    hub.drop_next("POST", "/commit/main", done=True)
    pushed = push(small, tag="v1")
    assert pushed.changed
    assert num_commits(hub) == 1
    assert hub.repo(REPO).tags == {"v1": pushed.revision}
    assert hub.waits == [1, 2][: times - 1], "nothing is waited for once it is there"


def test_hub_is_asked_again_where_the_client_asks_once(hub: HubDouble, small: Artefact) -> None:
    hub.fail_next("GET", "/refs", 503)
    hub.drop_next("POST", "/repos/create", done=True)
    hub.fail_next("POST", "/validate-yaml", 502)
    hub.fail_next("POST", "/commit/", 500)
    hub.fail_next("POST", "/branch/", 429, headers={"Retry-After": "9"})
    hub.fail_next("POST", "/tag/", 503)
    pushed = push(small, revision="next", tag="v1")
    assert hub.waits == [1, 1, 9, 1, 2, 1]
    assert hub.repo(REPO).tags == {"v1": pushed.revision}
    assert stored(hub, "next") == contents(small.folder)


def test_hub_with_a_fault_of_its_own_is_given_up_at(hub: HubDouble, small: Artefact) -> None:
    hub.fail_next("POST", "/commit/", 503, times=4)
    with pytest.raises(HubError, match=r"status 503.*run again later.*what was uploaded is kept"):
        push(small)
    assert hub.waits == [1, 2, 4]
    assert push(small).changed


def test_hub_that_asks_to_wait_for_hours_is_told_of(hub: HubDouble, small: Artefact) -> None:
    hub.fail_next("GET", "/refs", 429, times=4, headers={"Retry-After": "7200"})
    with pytest.raises(HubError, match=r"too many requests.*wait a few minutes"):
        push(small)
    assert hub.waits == [60, 60, 60]


@pytest.mark.parametrize(
    ("status", "message"),
    [(413, "larger than the Hub takes"), (402, r"refuses \(status 402\)"), (409, "conflicts")],
)
def test_hub_refusals_are_not_repeated(
    status: int, message: str, hub: HubDouble, small: Artefact
) -> None:
    hub.fail_next("POST", "/commit/", status, headers={"X-Error-Message": "So it is."})
    with pytest.raises(HubError, match=f"{message}.*So it is"):
        push(small)
    assert hub.waits == []


def test_hub_that_is_away_is_named_with_a_remedy(hub: HubDouble, small: Artefact) -> None:
    hub.close()
    with pytest.raises(HubError, match=r"cannot be reached.*--dry-run needs no network"):
        push(small)
    with pytest.raises(HubError, match=r"cannot be reached.*no whole copy of it was pulled"):
        pull(REPO)
    with pytest.raises(HubError, match="cannot be reached"):
        the_hub.head_manifest(REPO)


def test_hub_offline_is_told_at_once(
    hub: HubDouble, small: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set; unset it.*--dry-run"):
        push(small)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*no whole copy"):
        pull(REPO)
    assert (hub.requests, hub.waits) == ([], [])


@pytest.mark.parametrize("card", ["---\na: [\n---\n", None])
def test_hub_looks_at_the_card_before_the_commit(
    card: str | None, hub: HubDouble, small: Artefact
) -> None:
    if card is None:
        hub.fail_next("POST", "/validate-yaml", 503, times=4)
    else:
        (small.folder / CARD_FILE).write_text(card)
    with pytest.raises(HubError, match="Invalid metadata in README.md" if card else "not JSON"):
        push(small)
    assert num_commits(hub) == 0


def test_hub_that_leaves_out_a_file_is_found_out(hub: HubDouble, small: Artefact) -> None:
    modes = dict.fromkeys(contents(small.folder), "regular") | dict.fromkeys(LARGE, "lfs")
    answer = [
        {"path": path, "uploadMode": mode, "shouldIgnore": path == "item_keys.json", "oid": None}
        for path, mode in modes.items()
    ]
    hub.fail_next("POST", "/preupload/", 200, body=json.dumps({"files": answer}).encode())
    with pytest.raises(HubError, match=r"does not hold item_keys\.json.*gitignore"):
        push(small)


def test_hub_client_tries_again_only_what_may_pass() -> None:
    for passing in (httpx2.ConnectError("x"), httpx2.ReadTimeout("x"), httpx2.ReadError("x")):
        assert calls.is_passing(passing)
    for lasting in (httpx2.ProxyError("x"), httpx2.UnsupportedProtocol("x"), ValueError(), None):
        assert not calls.is_passing(lasting)
