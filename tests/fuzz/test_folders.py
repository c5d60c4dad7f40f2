"""Published folders that were changed on purpose: a typed error, or finite recommendations.

A folder takes as long as some hundred updates: a long run tries one for every ten of ``PFM_FUZZ``.
"""

import functools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pfm_llm.base import files
from pfm_llm.base.errors import PfmError
from pfm_llm.data import sources
from pfm_llm.model.build import build_model
from pfm_llm.protocol.types import SharedState
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    CARD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    TRAINING_CONFIG_FILE,
    read_artefact,
)
from pfm_llm.publish.export import Exported, export_shared_adapter
from pfm_llm.publish.staging import stage
from pfm_llm.publish.versions.difference import diff_versions
from pfm_llm.recommender import Recommender
from tests.fuzz import NUM_INPUTS, hostile, report
from tests.support.tiny import Tiny
from tests.support.tiny_models import stirred

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -1e308, 1e308, 5e-324),
    *(
        "",
        "x",
        "1",
        "../../etc/passwd",
        "/dev/zero",
        "a\n\x1b[2Jsigned by me",
        "\u202e",
        "x" * 5000,
    ),
    *(
        "\ud800",
        "next_item.v1",
        "all-linear",
        ".*",
        "like",
        "both",
        [],
        [[]],
        [0],
        [None],
        {},
        {"": 0},
    ),
    functools.reduce(lambda tree, _: [tree], range(40), 0),
    functools.reduce(lambda tree, _: {"a": tree}, range(200), 0),
)
LITERALS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":0,"a":1}', b"\xff")
CANNOT_CHANGE = (ValueError, TypeError, LookupError, OSError, RecursionError, MemoryError)
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, 1e20, -1e20, 1e-45, 0.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)
SIZES = (0, 1, 7, 8, 9, 1 << 20, 1 << 28, 1 << 45)
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 8)}]\n"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An export of the tiny model, with random tensors in place of training.

    While it is there, the base is loaded once. Nobody changes it, and loading takes the longest.
    """
    folder = tmp_path_factory.mktemp("fuzzed")
    config = tiny.config(folder, method="pfm")
    catalogue = sources.load_catalogue(str(tiny.items))
    parts = build_model(config, catalogue, None, torch.device("cpu"))
    shared = SharedState(stirred(parts.shared.tensors, 0), 3)
    export_shared_adapter(Exported(config, parts, catalogue), folder / "export", shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pfm_llm.model.build.load_backbone", lambda *_: parts.backbone)
        yield folder / "export"


def is_small(path: Path) -> bool:
    """Whether a file is a plain one of a size to read; a change must not reach through a link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= SIZES[-2]


def checked(path: Path) -> Path:
    if not is_small(path):
        raise ValueError(f"an earlier change took {path.name}")
    return path


def some_file(folder: Path, random: Random, suffix: str = "") -> Path:
    return random.choice(sorted(filter(is_small, folder.rglob(f"*{suffix}"))))


def flip(folder: Path, random: Random) -> None:
    path = some_file(folder, random)
    content = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 4, 100))):
        # Half of them near the start, where the headers are.
        reach = len(content) if random.random() < 0.5 else min(len(content), 300)
        if reach:
            content[random.randrange(reach)] = random.randrange(256)
    path.write_bytes(content)


def resize(folder: Path, random: Random) -> None:
    path = some_file(folder, random)
    size = path.stat().st_size
    os.truncate(path, random.choice((*SIZES, size // 2, max(size - 1, 0), size + 1)))


def swap(folder: Path, random: Random) -> None:
    one, other = some_file(folder, random), some_file(folder, random)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def another_kind(folder: Path, random: Random) -> None:
    path = some_file(folder, random)
    path.unlink()
    kind = random.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind < 5:
        targets = (
            "/dev/zero",
            "/etc/os-release",
            path.name,
            str(some_file(folder, random)),
            "none",
        )
        path.symlink_to(random.choice(targets))


def change_tree(folder: Path, random: Random) -> None:
    names = (MANIFEST_FILE, MANIFEST_FILE, MANIFEST_FILE, ADAPTER_CONFIG_FILE, ITEM_KEYS_FILE)
    path = checked(folder / random.choice(names))
    tree = json.loads(path.read_bytes())
    replace_some(tree, random)
    content = json.dumps(tree).encode()
    if random.random() < 0.2:
        digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
        if digits:
            place = random.choice(digits)
            content = content[:place] + random.choice(LITERALS) + content[place + 1 :]
    path.write_bytes(content)


def replace_some(tree: Any, random: Random) -> None:
    """Replace, remove or add one value somewhere in a tree."""
    while True:
        keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = random.choice(keys)
        if not isinstance(tree[key], (dict, list)) or not tree[key] or random.random() < 0.1:
            break
        tree = tree[key]
    what = random.random()
    if what < 0.8:
        tree[key] = random.choice(HOSTILE)
    elif what < 0.9:
        del tree[key]
    elif isinstance(tree, dict):
        tree[str(random.choice(HOSTILE))[:50]] = random.choice(HOSTILE)


def change_header(folder: Path, random: Random) -> None:
    path = some_file(folder, random, ".safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    replace_some(tree, random)
    header = json.dumps(tree).encode()
    stated = len(header) if random.random() < 0.8 else random.choice((0, 1, 1 << 33, 1 << 63))
    path.write_bytes(stated.to_bytes(8, "little") + header + content[8 + length :])


def change_tensor(folder: Path, random: Random) -> None:
    path = some_file(folder, random, ".safetensors")
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    name = random.choice(sorted(tensors))
    value = tensors[name]
    what = random.randrange(6)
    if what == 0:
        value.view(-1)[random.randrange(value.numel())] = random.choice(NUMBERS)
    elif what == 1:
        value.fill_(random.choice(NUMBERS))
    elif what == 2:
        tensors[name] = value.to(random.choice(DTYPES))
    elif what == 3:
        tensors[name] = random.choice((value[:1], value[:0], value[None], value.view(-1)))
    elif what == 4:
        tensors.pop(name)
    else:
        other = random.choice(("head.item_bias", "lora.model.layers.1.mlp.up_proj.A", "private.x"))
        tensors[other] = value.clone()
    save_file({key: one.contiguous() for key, one in tensors.items()}, path)


def change_text(folder: Path, random: Random) -> None:
    path = checked(
        random.choice([folder / TRAINING_CONFIG_FILE, folder / CARD_FILE, *folder.glob("prom*/*")])
    )
    text = path.read_text()
    lines = text.splitlines()
    place = random.randrange(len(lines))
    lines[place] = random.choice(
        (
            BOMB,
            "a: " + "[" * 3000,
            "x = " + "[" * 3000,
            'item = "{title}[" ',
            'header = "' + "x" * 60_000 + '"',
            "\x1b[2J",
            "!!python/object/apply:os.system [id]",
            lines[place] * 2,
            "",
        )
    )
    path.write_text("\n".join(lines))


MUTATIONS: tuple[Callable[[Path, Random], None], ...] = (
    *(flip, resize, swap, another_kind, change_tree, change_tree, change_tree),
    *(change_header, change_tensor, change_tensor, change_text),
)


def seal(folder: Path) -> None:
    """Make the hashes of the manifest fit the files, where both can be read."""
    try:
        if not is_small(folder / MANIFEST_FILE):
            return
        tree = json.loads((folder / MANIFEST_FILE).read_bytes())
        for name in filter(lambda name: is_small(folder / name), tree["files"]):
            tree["files"][name] = files.sha256_of(folder / name)
        content = json.dumps(tree).encode()
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return
    (folder / MANIFEST_FILE).write_bytes(content)


def uses(folder: Path, original: Path, tiny: Tiny) -> list[Callable[[], object]]:
    """Everything that reads a published folder."""

    def serve() -> None:
        model = Recommender.from_pretrained(
            folder, catalogue=str(tiny.items), backbone=str(tiny.model)
        )
        for history in (["i3", "i4"], []):
            items = model.recommend(history, k=3)
            assert len(items) == 3
            assert all(math.isfinite(item.score) for item in items)

    return [
        serve,
        lambda: diff_versions(read_artefact(original), read_artefact(folder)),
        lambda: stage(folder, folder.with_name("staged"), None),
    ]


def test_a_changed_folder_is_refused_or_recommends(exported: Path, tiny: Tiny) -> None:
    counts = Counter({"inputs": 0, "refused": 0, "untyped_errors": 0})

    @hostile(short=12, long=NUM_INPUTS // 10)
    @given(
        random=st.randoms(use_true_random=False), count=st.integers(1, 3), sealed=st.integers(0, 9)
    )
    def check(random: Random, count: int, sealed: int) -> None:
        folder = exported.with_name("changed")
        for path in (folder, folder.with_name("staged")):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(exported, folder)
        for _ in range(count):
            try:
                random.choice(MUTATIONS)(folder, random)
            except CANNOT_CHANGE:
                pass  # what an earlier change left cannot be changed in this way
            except Exception as error:
                if type(error).__name__ != "SafetensorError":
                    raise
        if sealed:
            seal(folder)
        refused = 0
        for use in uses(folder, exported, tiny):
            try:
                use()
            except PfmError:
                refused = 1
            except BaseException:
                counts["untyped_errors"] += 1
                raise
        counts.update(inputs=1, refused=refused)

    try:
        check()
    finally:
        report("folders", counts)
