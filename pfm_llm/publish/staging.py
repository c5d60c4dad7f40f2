"""The checked copy of a folder before it is published.

`stage` copies the files that the manifest lists into a new folder, checks the content of each
file, and searches all of them for every private tensor of the run, and for what private tensors
make of shared ones. A private adapter has the format and the names of a shared one, so only a
comparison of the numbers can find it.
"""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pfm_llm.base import files
from pfm_llm.base.errors import ArtefactError, CorruptFileError, PrivateLeakError
from pfm_llm.base.progress import Progress
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.protocol.types import Group, PrivateState, of_group
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    BASIS_FILE,
    CARD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    PLAIN_LORA,
    SIGNATURE_FILE,
    TRAINING_CONFIG_FILE,
    Artefact,
    check_listing,
    read_artefact,
    size_limit,
)
from pfm_llm.publish.foreign import ForeignFolder, texts
from pfm_llm.publish.leak_search import find_private
from pfm_llm.publish.manifest import Manifest
from pfm_llm.publish.products import Products
from pfm_llm.server.checkpoint import SERVER_FOLDER, CheckpointStore
from pfm_llm.server.state_names import shared_tensors

_T = TypeVar("_T")
_AGAIN = "export the run again (`pfm evaluate`)"
_NOTHING_SENT = "nothing was sent"
_PATH = re.compile(r"/|~|\\\\|[A-Za-z]:[\\/]|file:")
_KEY = re.compile(r"[0-9a-f]{32}")
_LAYER = re.compile(r"\.(\d+)\.")
_PNG = b"\x89PNG\r\n\x1a\n"


def stage(exported: Path, into: Path, private_root: Path | None) -> Artefact:
    """Copy the listed files into a new folder, and check all of them.

    Args:
        exported: An exported folder; links are not followed.
        into: A folder that does not exist yet.
        private_root: The run's private store; None if the run has no private part.

    Returns:
        The copy.

    Raises:
        PrivateLeakError: A private tensor is in a file.
        ArtefactError: ``exported`` is no shared adapter or holds a file that does not belong in
            one, or there is no private store.
        CorruptFileError: A file does not match the manifest, or a private state or the server's
            checkpoint is damaged.
        StorageError: A file cannot be read or written.
    """
    if private_root is not None and not private_root.is_dir():
        raise ArtefactError(
            f"there is no private store at {private_root} to compare {exported} with, so nobody "
            f"can tell whether something private is in it; {_NOTHING_SENT}. Push from where the "
            "run was trained, or bring its private folder back"
        )
    try:
        _copy(exported, into)
    except ArtefactError:
        if private_root is not None:
            _search(exported, private_root, exported)  # if it is that, it is to be said
        raise
    staged = read_artefact(into, origin=str(exported))
    if private_root is not None:
        _search(into, private_root, exported)
    _check_texts(staged)
    _check_adapter_config(staged)
    staged.contents()
    return staged


def _copy(exported: Path, into: Path) -> None:
    """Copy exactly the listed files, the manifest and the card."""
    if exported.is_symlink() or not exported.is_dir():
        raise ArtefactError(f"there is no exported adapter at {exported}; {_AGAIN}")
    source = ForeignFolder(exported, str(exported))
    if not source.has(MANIFEST_FILE):
        raise ArtefactError(
            f"{exported} has no {MANIFEST_FILE}: it is not a shared adapter that pfm_llm "
            f"exported; {_AGAIN}"
        )
    content = source.read(MANIFEST_FILE, size_limit(MANIFEST_FILE))
    manifest = Manifest.from_bytes(content, f"{exported}: {MANIFEST_FILE}")
    check_listing(manifest, str(exported))
    allowed = {*manifest.files, MANIFEST_FILE, SIGNATURE_FILE, CARD_FILE}
    for parent, folder_names, names in os.walk(exported):
        for path in sorted(Path(parent, name) for name in folder_names + names):
            name = path.relative_to(exported).as_posix()
            if path.is_symlink():
                raise ArtefactError(f"{path} is a link; {_NOTHING_SENT}: {_AGAIN}")
            if not path.is_dir() and name not in allowed:
                raise ArtefactError(
                    f"{exported} holds {name}, which has no place in a shared adapter's folder; "
                    f"{_NOTHING_SENT}. Remove it after a look at what it is"
                )
    files.write_bytes(into / MANIFEST_FILE, content)
    for name in (*manifest.files, CARD_FILE):
        files.write_bytes(into / name, source.read(name, size_limit(name)))


def _refusal(staged: Artefact, file: str, problem: str) -> ArtefactError:
    return ArtefactError(f"{staged.origin}: {file} {problem}; {_NOTHING_SENT}: {_AGAIN}")


def _check_texts(staged: Artefact) -> None:
    """Check that no text names a path of this machine; check keys, prompt and plots."""
    manifest, folder = staged.manifest, staged.files
    try:
        card = folder.read(CARD_FILE, size_limit(CARD_FILE)).decode()
    except UnicodeDecodeError as error:
        raise _refusal(staged, CARD_FILE, f"cannot be read ({error})") from error
    trees = {
        MANIFEST_FILE: manifest.model_dump(mode="json"),
        ADAPTER_CONFIG_FILE: folder.json(ADAPTER_CONFIG_FILE),
        TRAINING_CONFIG_FILE: staged.training_settings(),
        CARD_FILE: card,
    }
    for name, tree in trees.items():
        for key, text in texts(tree):
            if _PATH.match(text):
                raise _refusal(staged, name, f"names a path of this machine at {key}: {text}")
    if not all(map(_KEY.fullmatch, staged.item_keys())):
        raise _refusal(staged, ITEM_KEYS_FILE, "holds something else than keys")
    staged.prompt()
    for name in manifest.files:
        if name.endswith(".png") and not folder.read(name, size_limit(name)).startswith(_PNG):
            raise _refusal(staged, name, "is no PNG image")


def _check_adapter_config(staged: Artefact) -> None:
    """Check for a plain LoRA with the manifest's rank and modules, and a portable base name."""
    manifest, shared = staged.manifest, staged.manifest.adapters.shared
    tree = staged.files.json(ADAPTER_CONFIG_FILE)
    if not isinstance(tree, dict):
        raise _refusal(staged, ADAPTER_CONFIG_FILE, "holds no settings")
    wanted = {
        **PLAIN_LORA,
        "base_model_name_or_path": manifest.base.name,
        "r": shared.rank,
        "lora_alpha": shared.alpha,
        "use_rslora": shared.use_rslora or None,
    }
    for key, value in wanted.items():
        if (tree.get(key) or None) != value:
            raise _refusal(
                staged, ADAPTER_CONFIG_FILE, f"has {key}: {tree.get(key)!r}, expected {value!r}"
            )
    base = manifest.base.name
    # An export reduces the path of a local folder to its name.
    if base.startswith(".") or base.count("/") > 1 or ("/" in base and Path(base).is_dir()):
        raise _refusal(
            staged, ADAPTER_CONFIG_FILE, f"names a base on this machine, {base}, not a Hub id"
        )
    targets = _distinct(str, tree.get("target_modules"))
    layers = _distinct(int, tree.get("layers_to_transform"))
    pairs = [(t, m) for t in targets or () for m in manifest.modules if f".{m}".endswith(f".{t}")]
    found = {int(match[1]) for m in manifest.modules if (match := _LAYER.search(m))}
    stated = targets, {*manifest.modules}, layers
    if stated != ({t for t, _ in pairs}, {m for _, m in pairs}, found):
        raise _refusal(
            staged, ADAPTER_CONFIG_FILE, "adapts other modules or layers than the manifest says"
        )


def _distinct(kind: type[_T], value: Any) -> set[_T] | None:
    """The values of a list, or the one value; None where one of them is of another type."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return set(values) if all(type(one) is kind for one in values) else None


def _search(folder: Path, private_root: Path, origin: Path) -> None:
    clients: dict[str, set[str]] = defaultdict(set)
    products = _products(folder, private_root)
    for finding in find_private(folder, _states(PrivateStore(private_root)), products):
        clients[finding.file].add(finding.client_id)
    if clients:
        found = ", ".join(
            f"{file} of {len(ids)} client{'s' * (len(ids) > 1)}" for file, ids in clients.items()
        )
        raise PrivateLeakError(
            f"{origin} holds private tensors ({found}); {_NOTHING_SENT}, and the folder is not "
            f"to be shared in any other way. Delete it and {_AGAIN}"
        )


def _products(folder: Path, private_root: Path) -> Products:
    """The products of private tensors with the basis of the folder, and with that of the run.

    Where a product stands in the place of a factor, the run alone still has the factor.
    """
    source, shared, scales = ForeignFolder(folder, str(folder)), [], []
    # A folder may be damaged, or none of ours. The search goes on, and other checks say so.
    with contextlib.suppress(ArtefactError, CorruptFileError):
        shared.append(source.tensors(BASIS_FILE))
    with contextlib.suppress(CorruptFileError):
        content = source.read(MANIFEST_FILE, size_limit(MANIFEST_FILE))
        private = Manifest.from_bytes(content, MANIFEST_FILE).adapters.private
        scales = [private.scale, private.scale * private.weight]
    checkpoint = CheckpointStore(private_root / SERVER_FOLDER).load()
    if checkpoint is not None:
        shared.append(of_group(shared_tensors(checkpoint.tensors), Group.BASIS))
    return Products(shared, scales)


def _states(store: PrivateStore) -> Iterator[PrivateState]:
    """Every version of every client's private state, including personalised states."""
    client_ids = store.client_ids()
    with Progress(len(client_ids), "searching for private tensors") as progress:
        for client_id in client_ids:
            for version in store.versions(client_id):
                if (state := store.load(client_id, version)) is not None:
                    yield state
            if (state := store.load_personalised(client_id)) is not None:
                yield state
            progress.update()
