"""The routes through which file contents go up and down."""

import base64
import binascii
import hashlib
import json
import re
from typing import Any
from urllib.parse import quote

from tests.support.hub_double.state import HubError, HubState, Routes, lines
from tests.support.hub_double.store import Entry, Repo
from tests.support.hub_double.wire import Call, Reply

route = Routes()
storage_route = Routes()
_MODEL = "/api/{kind}/{repo}"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@route("POST", _MODEL + "/preupload/{revision}")
def preupload(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    commit = state.commit(repo, call)
    if "gitIgnore" in call.json:
        state.unknown.append("the rules of a .gitignore")
    answers = []
    for file in call.json["files"]:
        path, size = file["path"], file["size"]
        sample = base64.b64decode(file["sample"])
        large = repo.goes_to_lfs(path, size, sample, commit.oid)
        there = commit.tree.get(path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
                "oid": there.key if there else None,
            }
        )
    return Reply.of({"files": answers})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    if call.json["operation"] != "upload" or "basic" not in call.json["transfers"]:
        raise HubError(501, "The double knows basic uploads only.")
    objects = []
    for wanted in call.json["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size}
        if oid not in repo.blobs:
            state.granted[repo.repo_id, oid] = size
            verify = {"href": f"{state.url}/{repo.repo_id}.git/info/lfs/objects/verify"}
            upload = {"href": state.storage_link("PUT", repo, oid)}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Reply.of({"transfer": "basic", "objects": objects})


@storage_route("PUT", "/lfs/{repo}/{sha256}")
def lfs_put(state: HubState, call: Call) -> Reply:
    repo, oid = _signed(state, call)
    if len(call.body) != state.granted.get((repo.repo_id, oid)):
        raise HubError(400, "The size is not as it was declared.")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the hash that was declared.")
    repo.blobs[oid] = call.body
    return Reply(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(state: HubState, call: Call) -> Reply:
    content = state.writable(call).blobs.get(call.json["oid"])
    if content is None or len(content) != call.json["size"]:
        raise HubError(404, "The object was not uploaded.")
    return Reply.of({"success": True})


@route("POST", _MODEL + "/commit/{revision}")
def commit(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    branch = call.parts["revision"]
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    if "create_pr" in call.query:
        raise HubError(501, "The double has no pull requests.")
    head, *changes = (json.loads(line) for line in lines(call.body))
    expected = head["value"].get("parentCommit")
    if expected and not repo.branches[branch].startswith(expected):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(repo.at(branch).tree)
    for change in changes:
        _change(repo, tree, change["key"], change["value"])
    author = state.known_caller(call).user
    made = repo.commit(branch, tree, head["value"]["summary"], head["value"]["description"], author)
    url = f"{state.url}/{repo.repo_id}/commit/{made.oid}"
    return Reply.of({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


@route("HEAD", "[/datasets]/{repo}/resolve/{revision}/{path}")
@route("GET", "[/datasets]/{repo}/resolve/{revision}/{path}")
def resolve(state: HubState, call: Call) -> Reply:
    """A small file itself; for a large one, where the storage has it."""
    repo = state.readable(call)
    commit = state.commit(repo, call)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    path = call.parts["path"]
    entry = commit.tree.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    if entry.sha256 is None:
        headers["ETag"] = f'"{entry.oid}"'
        return _content(call, repo.blobs[entry.oid], headers, path)
    headers["X-Linked-Size"] = str(entry.size)
    headers["X-Linked-ETag"] = f'"{entry.sha256}"'
    headers["Location"] = state.storage_link("GET", repo, entry.sha256, path)
    return Reply(302, headers, b"Found.")


@storage_route("GET", "/lfs/{repo}/{sha256}")
def lfs_get(state: HubState, call: Call) -> Reply:
    repo, oid = _signed(state, call)
    return _content(call, repo.blobs[oid], {"ETag": f'"{oid}"'}, call.query["filename"])


def _signed(state: HubState, call: Call) -> tuple[Repo, str]:
    """The repo and the hash of a link to the storage."""
    repo_id, sha256 = call.parts["repo"], call.parts["sha256"]
    if "authorization" in call.headers:
        raise HubError(400, "Only one auth mechanism allowed")  # and the token has leaked
    if call.query.get("signature") != state.signature(call.method, repo_id, sha256):
        raise HubError(403, "SignatureDoesNotMatch")
    if repo_id not in state.repos:
        raise HubError(404, "NoSuchKey")
    return state.repos[repo_id], sha256


def _change(repo: Repo, tree: dict[str, Entry], kind: str, value: dict[str, Any]) -> None:
    """Change the files of a commit that is being made."""
    path = value["path"]
    if kind == "file":
        tree[path] = repo.keep(_decoded(value))
    elif kind == "lfsFile":
        if value["oid"] not in repo.blobs:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        tree[path] = repo.kept(value["oid"])
    elif kind == "deletedFile":
        if tree.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif kind == "deletedFolder":
        inside = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del tree[name]
    else:
        raise HubError(400, f"Unknown operation: {kind}")


def _decoded(value: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error:
        raise HubError(400, f"Not base64: {value['path']}") from None


def _content(call: Call, content: bytes, headers: dict[str, str], path: str) -> Reply:
    """A file, or the range of it that is asked for."""
    name = quote(path.rsplit("/", 1)[-1])
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        **headers,
    }
    asked = _RANGE.fullmatch(call.headers.get("range", ""))
    if asked is None or not any(asked.groups()):
        return Reply(200, headers, content)
    first, last = asked.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
        return Reply(416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Reply(206, headers, content[start:end])
