"""What may be published is staged; private tensors and what has no place are refused."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pfm_llm.base.errors import (
    ArtefactError,
    CorruptFileError,
    PfmError,
    PrivateLeakError,
)
from pfm_llm.client.private_store import PrivateStore
from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish.artefact import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    HEAD_FILE,
    ITEM_KEYS_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TRAINING_CONFIG_FILE,
)
from pfm_llm.publish.staging import stage
from pfm_llm.runs.folders import RunFolders
from tests.support.exports import (
    a_private_state,
    change_json,
    change_tensors,
    change_yaml,
    copy_of,
    exported,
    in_a_plot,
    manifest_of,
    numbers_as,
    private,
    put_into,
    run,
    seal,
    some_a,
    state_files,
)

__all__ = ["exported", "private", "run"]
FOLDED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- what is staged ---------------------------------------------------------------------------


def test_stages_what_the_manifest_lists_and_nothing_else(
    exported: Path, private: Path, tmp_path: Path
) -> None:
    (exported / SIGNATURE_FILE).write_bytes(b"of another version")
    staged = stage(exported, tmp_path / "staged", private)
    names = {*manifest_of(exported).files, MANIFEST_FILE, CARD_FILE}
    found = {name: content for name, (content, _) in state_files(staged.folder).items()}
    assert found == {name: (exported / name).read_bytes() for name in names}
    assert {"plots/loss.png", "prompts/next_item.v2.toml", HEAD_FILE} < names
    assert staged.folder == tmp_path / "staged"


# --- what is private --------------------------------------------------------------------------


Hide = Callable[[Path, bytes], None]


def in_the_head(folder: Path, content: bytes) -> None:
    change_tensors(folder, HEAD_FILE, lambda t: put_into(t["normaliser.basis"], content))


def in_the_adapter(folder: Path, content: bytes) -> None:
    change_tensors(folder, ADAPTER_FILE, lambda t: put_into(next(iter(t.values())), content))


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
    secret = some_a(a_private_state(private))
    hide(exported, numbers_as(secret.T if transposed else secret, dtype))
    seal(exported)
    with pytest.raises(PrivateLeakError) as caught:
        stage(exported, tmp_path / "staged", private)
    assert f"({file} of 1 client)" in str(caught.value)
    assert "nothing was sent" in str(caught.value)


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
    # Not B: Adam's first steps are of one size, and to three digits two clients may agree on eight.
    tensors = a_private_state(private).tensors
    secret = next(value for name, value in tensors.items() if name.endswith("down_proj.A"))
    write(exported, secret.reshape(-1).tolist())
    seal(exported)
    with pytest.raises(PrivateLeakError, match="of 1 client"):
        stage(exported, tmp_path / "staged", private)


def test_every_version_of_every_client_is_looked_for(exported: Path, tmp_path: Path) -> None:
    store, states = PrivateStore(tmp_path / "x.private"), []
    for number, (client_id, version) in enumerate(itertools.product(("a", "b"), (1, 2, 3))):
        generator = torch.Generator().manual_seed(number)
        tensors = {"private.head.B": torch.randn(4, 8, generator=generator)}
        states.append(PrivateState(client_id, version, tensors))
        (store.save_personalised if version == 3 else store.save)(states[-1])
    stage(exported, tmp_path / "staged", tmp_path / "x.private")
    for number, state in enumerate(states):
        folder = copy_of(exported, tmp_path / f"leaky-{number}")
        in_a_plot(folder, numbers_as(state.tensors["private.head.B"], torch.float32))
        seal(folder)
        with pytest.raises(PrivateLeakError, match="of 1 client"):
            stage(folder, tmp_path / f"staged-{number}", tmp_path / "x.private")


def test_a_damaged_private_state_stops_it_since_nothing_can_be_compared(
    run: Path, exported: Path, private: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "tiny.private"
    shutil.copytree(private, damaged)
    file = next(damaged.glob("clients/*/personalised.*"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match="the private state of client"):
        stage(exported, tmp_path / "staged", damaged)


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
        pytest.param(
            lambda folder: change_json(
                folder, ADAPTER_CONFIG_FILE, lambda t: t["target_modules"].append("lm_head")
            ),
            "other modules",
            id="another target",
        ),
        pytest.param(adapter_config(target_modules=".*"), "other modules", id="expression"),
        pytest.param(adapter_config(layers_to_transform=[0, 1]), "other modules", id="layers"),
        pytest.param(adapter_config(layers_to_transform=None), "other modules", id="all layers"),
        pytest.param(adapter_config(layers_to_transform=[[0]]), "other modules", id="deep layers"),
        pytest.param(adapter_config(layers_to_transform=True), "other modules", id="odd layers"),
        pytest.param(adapter_config(target_modules=[["x"]]), "other modules", id="deep targets"),
        pytest.param(adapter_config(target_modules={"a": 1}), "other modules", id="odd targets"),
        pytest.param(adapter_config(revision="/data/x"), "path of this machine at revi", id="path"),
        pytest.param(text_file(ADAPTER_CONFIG_FILE, b"[]"), "holds no settings", id="no tree"),
        pytest.param(text_file(ADAPTER_CONFIG_FILE, b"{x: ["), "is not valid JSON", id="no JSON"),
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
            r"as float32\[1, .*expected float32\[2, \d+\]",
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
    for folder in (client, RunFolders.of(run).server, run, tmp_path / "absent"):
        with pytest.raises(ArtefactError):
            stage(folder, tmp_path / "staged", private)
    with pytest.raises(PrivateLeakError):
        stage(client, tmp_path / "staged", private)


def test_the_export_of_a_run_shows_no_path_of_this_machine(run: Path) -> None:
    tree = yaml.safe_load((run / "shared_adapter" / TRAINING_CONFIG_FILE).read_text())
    assert tree["data"]["source"] == "interactions.csv"
    assert str(run.parent) not in (run / "shared_adapter" / CARD_FILE).read_text()
