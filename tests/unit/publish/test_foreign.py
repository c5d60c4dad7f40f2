"""Folders that somebody else made: every read is bounded, and each refusal names the file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pfm_llm.base.errors import ArtefactError, CorruptFileError, PfmError, StorageError
from pfm_llm.config.model import AdaptersConfig
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    HEAD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    TRAINING_CONFIG_FILE,
    Artefact,
    prompt_file,
    read_artefact,
)
from pfm_llm.publish.foreign import ForeignFolder
from pfm_llm.publish.versions.restore import copy_artefact
from tests.support.exports import change_json, seal
from tests.support.small_artefacts import PROMPT, make_artefact, random_lora


@pytest.fixture
def made(tmp_path: Path) -> Artefact:
    return make_artefact(tmp_path / "made")


def with_tensors(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Artefact:
    tensors = {key: value.clone() for key, value in load_file(folder / name).items()}
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    seal(folder)
    return read_artefact(folder)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (HEAD_FILE, lambda t: t["head.item_bias"].fill_(torch.nan), "head.item_bias that are not"),
        (HEAD_FILE, lambda t: t["head.item_ids"][2].fill_(torch.inf), "not finite"),
        (HEAD_FILE, lambda t: t.update({"head.item_bias": torch.ones(5)}), "expected float32[6]"),
        (HEAD_FILE, lambda t: t.update({"normaliser.mean": torch.ones(7)}), "expected float32"),
        (HEAD_FILE, lambda t: t.update({"normaliser.basis": torch.eye(7)}), "normaliser.basis"),
        (HEAD_FILE, lambda t: t.pop("normaliser.mean"), "lacks normaliser.mean"),
        (HEAD_FILE, lambda t: t.update(random_lora(3)), "holds lora."),
        (HEAD_FILE, lambda t: t.update({"head.item_bias": torch.ones(6).half()}), "as float16[6]"),
        (ADAPTER_FILE, lambda t: t.clear(), "lacks lora."),
        (ADAPTER_FILE, lambda t: t.update({"head.item_bias": torch.ones(6)}), "no factor of a"),
    ],
)
def test_tensors_are_those_of_the_manifest_and_finite(
    name: str, change: Callable[[dict[str, Any]], Any], problem: str, made: Artefact
) -> None:
    changed = with_tensors(made.folder, name, change)
    with pytest.raises(PfmError) as caught:
        changed.contents()
    assert problem in str(caught.value)


def test_ranks_of_a_manifest_are_bounded_before_anything_is_made(made: Artefact) -> None:
    private = {"enabled": True, "kind": "independent"}
    huge: list[tuple[dict[str, Any], str]] = [
        ({"rank": 10**9, "alpha": 4}, "damaged at adapters.shared.rank"),
        ({"rank": 2, "alpha": 10**400}, "damaged at adapters.shared.alpha"),
        ({"rank": 4000, "alpha": 4}, r"expected float32\[4000, 8\]"),
    ]
    for shared, problem in huge:
        change_json(made.folder, MANIFEST_FILE, lambda t, s=shared: t["adapters"].update(shared=s))
        with pytest.raises(PfmError, match=problem):
            read_artefact(made.folder).contents()
    sized = {"shared": {"rank": 2, "alpha": 4}, "private": {**private, "rank": 10**9}}
    change_json(made.folder, MANIFEST_FILE, lambda t: t.update(adapters=sized))
    with pytest.raises(CorruptFileError, match=r"damaged at adapters\.private\.rank"):
        read_artefact(made.folder)
    with pytest.raises(ValueError, match="less than or equal to 4096"):
        AdaptersConfig.model_validate({"shared": {"rank": 10**9}})


BOMB = "a: &a [x, x]\n" + "".join(
    f"{k}: &{k} [*{c}, *{c}]\n" for c, k in zip("ab", "bc", strict=True)
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: " + "[" * 500, "[1]", "a: !!python/name:os.system", "\0"]
)
def test_yaml_that_grows_or_acts_is_refused(text: str, made: Artefact) -> None:
    (made.folder / TRAINING_CONFIG_FILE).write_text(text)
    seal(made.folder)
    with pytest.raises(CorruptFileError, match=r"training_config\.yaml"):
        read_artefact(made.folder).training_settings()


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x" * 70_000, "\0", "name = 1"])
def test_a_prompt_that_is_none_is_refused_at_once(text: str, made: Artefact) -> None:
    (made.folder / prompt_file(PROMPT)).write_text(text)
    seal(made.folder)
    with pytest.raises(CorruptFileError, match=r"next_item\.v1\.toml"):
        read_artefact(made.folder).prompt()


@pytest.mark.parametrize("name", [MANIFEST_FILE, HEAD_FILE, CARD_FILE, TRAINING_CONFIG_FILE])
def test_what_is_no_plain_file_of_some_size_is_not_read(name: str, made: Artefact) -> None:
    path, folder = made.folder / name, ForeignFolder(made.folder, "it")
    os.truncate(path, 1 << 40)  # a sparse file: nothing is written
    with pytest.raises(CorruptFileError, match=f"it: {name} is larger than"):
        folder.read(name, 1 << 20)
    path.unlink()
    with pytest.raises(CorruptFileError, match=f"it: {name} is missing"):
        folder.read(name)
    for target in ("/etc/hostname", "/dev/zero", "../outside"):
        (made.folder.parent / "outside").touch()
        path.symlink_to(target)
        with pytest.raises(CorruptFileError, match=f"it: {name} is a link out of the folder"):
            folder.read(name)
        path.unlink()
    path.symlink_to(name)
    with pytest.raises(StorageError, match=f"it: cannot read {name}"):
        folder.read(name)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(CorruptFileError, match=f"it: {name} is not a plain file"):
            folder.read(name)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_card_that_is_a_link_does_not_bring_its_target_along(
    made: Artefact, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("mine")
    (made.folder / CARD_FILE).unlink()
    (made.folder / CARD_FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptFileError, match=r"README\.md is a link out of the folder"):
        copy_artefact(made, tmp_path / "copy")
    assert not (tmp_path / "copy" / CARD_FILE).exists()


def test_links_of_the_hub_client_s_cache_are_read(made: Artefact, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in made.folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(made.folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert read_artefact(snapshot).contents()[0].keys() == {
        *random_lora(0), "head.state_proj", "head.state_log_n", "head.item_proj", "head.item_bias",
        "head.item_ids", "head.item_ids_out",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["small\nsigned by you", "\x1b[2J", "a\u202eb", "\ud800", "x" * 2000]
)
def test_names_that_could_forge_a_line_are_refused(text: str, made: Artefact) -> None:
    change_json(made.folder, MANIFEST_FILE, lambda tree: tree.update(name=text))
    with pytest.raises(CorruptFileError, match="damaged at name: a text there"):
        read_artefact(made.folder)


def test_names_of_files_are_portable_and_differ_by_more_than_case(made: Artefact) -> None:
    for extra in ("plots/a\nb.png", "plots/.png", "plots/\x1b.png", "plots/a b.png"):
        files = {**made.manifest.files, extra: "0" * 64}
        changed = made.manifest.model_copy(update={"files": files})
        (made.folder / MANIFEST_FILE).write_bytes(changed.to_bytes())
        with pytest.raises(PfmError, match=r"has no place|damaged at files"):
            read_artefact(made.folder)
    files = {**made.manifest.files, "plots/a.png": "0" * 64, "plots/A.png": "0" * 64}
    changed = made.manifest.model_copy(update={"files": files})
    (made.folder / MANIFEST_FILE).write_bytes(changed.to_bytes())
    with pytest.raises(ArtefactError, match="names differ in case"):
        read_artefact(made.folder)


@pytest.mark.parametrize(
    "keys",
    [["a"], ["a"] * 6, [["a"]] * 6, {"a": 1}, [*"abcde", "f\n"], [*"abcdefg"], [*"abcde", None]],
)
def test_item_keys_are_as_many_different_texts_as_items(keys: object, made: Artefact) -> None:
    change_json(made.folder, ITEM_KEYS_FILE, lambda _: keys)
    seal(made.folder)
    with pytest.raises(CorruptFileError, match="does not hold 6 keys"):
        read_artefact(made.folder).item_keys()


def test_a_json_file_that_is_nested_without_end_is_refused(made: Artefact) -> None:
    (made.folder / ADAPTER_CONFIG_FILE).write_bytes(b"[" * 100_000)
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json is not valid JSON"):
        made.files.json(ADAPTER_CONFIG_FILE)
