"""A small folder that tests push to the double of the Hub, and what comes back."""

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from tests.support.hub_double import OWNER, WRITE_TOKEN, HubDouble

REPO = f"{OWNER}/tiny"
WEIGHTS = bytes(range(256)) * 300
LARGE = {"adapter_model.safetensors": WEIGHTS, "head.safetensors": WEIGHTS[1:]}
FILES = {
    **LARGE,
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n",
    "config.json": b"{}",
    "runs/a/notes.txt": b"small\n",
}


def api(hub: HubDouble, token: str | None = WRITE_TOKEN) -> HfApi:
    """A client with this token, or explicitly with none."""
    return HfApi(endpoint=hub.url, token=token or False)


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def push(hub: HubDouble, folder: Path) -> str:
    """Push all files to a new private repo, from this folder; returns the commit."""
    api(hub).create_repo(REPO, private=True)
    write_folder(folder, FILES)
    return api(hub).upload_folder(repo_id=REPO, folder_path=folder, commit_message="push").oid


def pull(hub: HubDouble, cache: Path, revision: str | None = None) -> dict[str, bytes]:
    """Name to content of what was pushed, downloaded through this cache."""
    folder = Path(
        snapshot_download(
            REPO, revision=revision, endpoint=hub.url, token=WRITE_TOKEN, cache_dir=cache
        )
    )
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return without_the_hubs(
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    )


def stored(hub: HubDouble) -> dict[str, bytes]:
    """Name to content of what was pushed, as the double has it."""
    return without_the_hubs(hub.repo(REPO).files())


def without_the_hubs(files: dict[str, bytes]) -> dict[str, bytes]:
    """These files, but for the one that the Hub itself adds to a repo."""
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def sha256(content: bytes) -> str:
    """The name of a large file in the storage."""
    return hashlib.sha256(content).hexdigest()
