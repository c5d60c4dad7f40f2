"""The routes of the API that know no file contents: repos, revisions, lists of files."""

import hashlib
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs

import yaml

from tests.support.hub_double.state import HubError, HubState, Routes
from tests.support.hub_double.store import MAIN, Commit, Entry, Repo, lfs_pointer
from tests.support.hub_double.wire import Call, Reply

route = Routes()
_MODEL = "/api/{kind}/{repo}"
_NAME = re.compile(r"\w(?:[\w./-]*\w)?")


@route("GET", "/api/whoami-v2")
def whoami(state: HubState, call: Call) -> Reply:
    caller = state.known_caller(call)
    token = {"displayName": "a token", "role": caller.role}
    return Reply.of(
        {
            "type": "user",
            "name": caller.user,
            "fullname": caller.user.title(),
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@route("POST", "/api/repos/create")
def create_repo(state: HubState, call: Call) -> Reply:
    caller = state.known_caller(call)
    owner = call.json["organization"] or caller.user
    repo_id = f"{owner}/{call.json['name']}"
    if call.json.get("type", "model") != "model":
        raise HubError(501, "The double has models only.")
    state.check_may_write(caller, owner)
    link = {"url": f"{state.url}/{repo_id}"}
    if repo_id in state.repos:
        return Reply.of({"error": "You already created this model repo", **link}, 409)
    state.repos[repo_id] = Repo(repo_id, private=call.json.get("visibility") == "private")
    return Reply.of({"name": repo_id, **link})


@route("DELETE", "/api/repos/delete")
def delete_repo(state: HubState, call: Call) -> Reply:
    caller = state.known_caller(call)
    owner = call.json["organization"] or caller.user
    repo_id = f"{owner}/{call.json['name']}"
    if repo_id not in state.repos:
        raise HubError(404, "Repository not found", "RepoNotFound")
    state.check_may_write(caller, owner)
    del state.repos[repo_id]
    return Reply.of({})


@route("POST", "/api/validate-yaml")
def validate_yaml(state: HubState, call: Call) -> Reply:
    """Check the head of a model card; the Hub looks also at the fields in it."""
    head = re.match(r"---\n(.*?)\n---(?:\n|$)", call.json["content"], re.DOTALL)
    empty = {"message": "empty or missing yaml metadata in repo card"}
    if head is None:
        return Reply.of({"errors": [], "warnings": [empty]})
    try:
        metadata = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return Reply.of({"errors": [{"message": f"YAML: {error}"}], "warnings": []}, 400)
    if not isinstance(metadata, dict):
        return Reply.of({"errors": [], "warnings": [empty]})
    return Reply.of({"errors": [], "warnings": []})


@route("GET", _MODEL + "[/revision/{revision}]")
def model_info(state: HubState, call: Call) -> Reply:
    repo = state.readable(call)
    commit = state.commit(repo, call)
    blobs = "blobs" in call.query
    siblings = [_sibling(path, entry, blobs) for path, entry in sorted(commit.tree.items())]
    return Reply.of(
        {
            "id": repo.repo_id,
            "modelId": repo.repo_id,
            "author": repo.owner,
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "createdAt": _iso(next(iter(repo.commits.values())).date),
            "lastModified": _iso(commit.date),
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    )


@route("GET", _MODEL + "/tree/{revision}[/{path}]")
def tree(state: HubState, call: Call) -> Reply:
    commit = state.commit(state.readable(call), call)
    folder = call.parts.get("path", "")
    inside = {
        path: entry
        for path, entry in commit.tree.items()
        if not folder or path.startswith(f"{folder}/")
    }
    if folder and not inside:
        raise HubError(404, f'"{folder}" is not a folder of it', "EntryNotFound")
    entries = [*_folders(inside, commit), *(_file(path, inside[path]) for path in inside)]
    if call.query.get("recursive", "").lower() not in ("true", "1"):
        depth = folder.count("/") + 1 if folder else 0
        entries = [entry for entry in entries if entry["path"].count("/") == depth]
    below = f"{folder}/" if folder else ""
    entries = [entry for entry in entries if entry["path"].startswith(below)]
    return state.page(call, sorted(entries, key=lambda entry: entry["path"]))


@route("POST", _MODEL + "/paths-info/{revision}")
def paths_info(state: HubState, call: Call) -> Reply:
    commit = state.commit(state.readable(call), call)
    folders = {folder["path"]: folder for folder in _folders(commit.tree, commit)}
    found = []
    for path in parse_qs(call.body.decode()).get("paths", []):
        if path in commit.tree:
            found.append(_file(path, commit.tree[path]))
        elif path in folders:
            found.append(folders[path])
    return Reply.of(found)


@route("GET", _MODEL + "/refs")
def refs(state: HubState, call: Call) -> Reply:
    repo = state.readable(call)
    pull_requests: dict[str, Any] = {"pullRequests": []} if "include_prs" in call.query else {}
    return Reply.of(
        {
            "branches": _refs("heads", repo.branches),
            "tags": _refs("tags", repo.tags),
            "converts": [],
            **pull_requests,
        }
    )


@route("GET", _MODEL + "/commits/{revision}")
def commits(state: HubState, call: Call) -> Reply:
    repo = state.readable(call)
    history = repo.history(state.commit(repo, call).oid)
    return state.page(
        call,
        [
            {
                "id": commit.oid,
                "title": commit.message,
                "message": commit.description,
                "date": _iso(commit.date),
                "authors": [{"user": commit.author}],
            }
            for commit in history
        ],
    )


@route("POST", _MODEL + "/tag/{revision}")
def create_tag(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    oid = state.commit(repo, call).oid
    _add_ref(repo.tags, call.json["tag"], oid, "Tag")
    return Reply.of({})


@route("DELETE", _MODEL + "/tag/{name}")
def delete_tag(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    _drop_ref(repo.tags, call.parts["name"])
    return Reply.of({})


@route("POST", _MODEL + "/branch/{name}")
def create_branch(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    start = {"revision": call.json.get("startingPoint", MAIN)}
    oid = state.commit(repo, Call(call.method, call.path, {}, {}, b"", start)).oid
    _add_ref(repo.branches, call.parts["name"], oid, "Branch")
    return Reply.of({})


@route("DELETE", _MODEL + "/branch/{name}")
def delete_branch(state: HubState, call: Call) -> Reply:
    repo = state.writable(call)
    if call.parts["name"] == MAIN:
        raise HubError(403, "Cannot delete the default branch")
    _drop_ref(repo.branches, call.parts["name"])
    return Reply.of({})


def _add_ref(oids: dict[str, str], name: str, oid: str, kind: str) -> None:
    if not _NAME.fullmatch(name) or name.startswith("refs/"):
        raise HubError(400, f"Invalid reference name: {name}")
    if name in oids:
        raise HubError(409, f"{kind} reference exists already")
    oids[name] = oid


def _drop_ref(oids: dict[str, str], name: str) -> None:
    if oids.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")


def _refs(kind: str, oids: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
        for name, oid in sorted(oids.items())
    ]


def _file(path: str, entry: Entry) -> dict[str, Any]:
    found = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256 is None:
        return found
    pointer = len(lfs_pointer(entry.sha256, entry.size))
    return {**found, "lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}}


def _folders(paths: Iterable[str], commit: Commit) -> list[dict[str, Any]]:
    folders = {path[:end] for path in paths for end in range(len(path)) if path[end] == "/"}
    found = []
    for folder in sorted(folders):
        keys = [
            f"{path}\0{commit.tree[path].key}" for path in paths if path.startswith(folder + "/")
        ]
        oid = hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()
        found.append({"type": "directory", "oid": oid, "size": 0, "path": folder})
    return found


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    """A file in the answer to a question about the repo, where the fields have other names."""
    if not blobs:
        return {"rfilename": path}
    found = {"rfilename": path, "size": entry.size, "blobId": entry.oid}
    if entry.sha256 is None:
        return found
    lfs = {**_file(path, entry)["lfs"], "sha256": entry.sha256}
    return {**found, "lfs": lfs}


def _iso(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
