"""The published folder: what its manifest may list, and items that follow their keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pfm_llm.base.errors import ArtefactError, CorruptFileError
from pfm_llm.config.choices import Task
from pfm_llm.config.earlier import BEFORE
from pfm_llm.config.model import AdaptersConfig, HeadConfig, TasteConfig
from pfm_llm.config.text import find_setting
from pfm_llm.data.interactions import Catalogue
from pfm_llm.model.lora import names_from_peft
from pfm_llm.model.parameters import parameter_table
from pfm_llm.protocol.parameters import Sizes
from pfm_llm.publish import artefact
from pfm_llm.publish.alignment import align_items, aligned_tensors
from pfm_llm.publish.artefact import check_listing
from pfm_llm.publish.manifest import Manifest
from pfm_llm.text.item_keys import item_keys
from pfm_llm.text.prompts import load_prompt
from tests.support.small_artefacts import (
    HIDDEN,
    MODULES,
    make_artefact,
    random_head,
    random_lora,
    small_manifest,
)
from tests.support.tables import config_of

PROMPT = load_prompt("next_item.v1")
HASH = "0" * 64


def catalogue(**titles: str) -> Catalogue:
    return Catalogue(tuple(titles), {"title": tuple(titles.values())})


def manifest_tree(**changes: Any) -> dict[str, Any]:
    names = [*artefact.REQUIRED_FILES, artefact.prompt_file("next_item.v1")]
    manifest = small_manifest(3, 2, tuple(random_lora(0)), 2, dict.fromkeys(names, HASH))
    return {**manifest.model_dump(mode="json"), **changes}


def parse(tree: Any) -> Manifest:
    return Manifest.from_bytes(json.dumps(tree).encode(), "it")


def test_manifest_survives_its_own_bytes() -> None:
    manifest = parse(manifest_tree())
    assert Manifest.from_bytes(manifest.to_bytes(), "it") == manifest
    assert manifest.to_bytes() == parse(manifest_tree()).to_bytes()


@pytest.mark.parametrize("key", [key for key in BEFORE if key.startswith("head.")])
def test_a_manifest_without_a_later_setting_is_of_an_adapter_without_it(key: str) -> None:
    tree = manifest_tree()
    tree["head"]["item_dropout"] = 0.0  # which needs items that were met
    del tree["head"][key.removeprefix("head.")]
    found = parse(tree)
    assert find_setting(found.model_dump(mode="json"), key) == BEFORE[key]
    assert found.items == parse(manifest_tree()).items  # other sections stay


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "it is not valid JSON"),
        (b"[]", "format None, this version of pfm_llm reads 5"),
        (json.dumps(manifest_tree(format=1)).encode(), "format 1, .*export the run again"),
        (json.dumps(manifest_tree(round="x")).encode(), "damaged at round"),
        (json.dumps(manifest_tree(extra=1)).encode(), "damaged at extra"),
    ],
)
def test_manifest_that_is_none_is_refused(content: bytes, match: str) -> None:
    with pytest.raises(CorruptFileError, match=match):
        Manifest.from_bytes(content, "it")


@pytest.mark.parametrize(
    "name",
    [
        "private.r000012.safetensors",
        "private/adapter_model.safetensors",
        "../adapter_model.safetensors",
        "/etc/passwd",
        "plots/../../secret.png",
        "plots/deep/loss.png",
        "metrics.jsonl",
    ],
)
def test_listing_refuses_what_has_no_place(name: str) -> None:
    files = {**manifest_tree()["files"], name: HASH}
    with pytest.raises(ArtefactError, match="has no place"):
        check_listing(parse(manifest_tree(files=files)), "it")


@pytest.mark.parametrize("name", manifest_tree()["files"])
def test_listing_misses_nothing_required(name: str) -> None:
    files = {key: value for key, value in manifest_tree()["files"].items() if key != name}
    with pytest.raises(ArtefactError, match="does not list"):
        check_listing(parse(manifest_tree(files=files)), "it")


def test_item_keys_depend_on_id_and_text() -> None:
    keys = item_keys(catalogue(a="Fargo", b="Heat"), PROMPT)
    assert keys == item_keys(catalogue(a="Fargo", b="Heat"), PROMPT)
    assert len(set(keys)) == 2
    other_text = item_keys(catalogue(a="Fargo II", b="Heat"), PROMPT)
    other_id = item_keys(catalogue(c="Fargo", b="Heat"), PROMPT)
    assert other_text[0] != keys[0] != other_id[0]
    assert other_text[1] == keys[1] == other_id[1]


def test_rows_follow_their_items() -> None:
    alignment = align_items(["a", "b", "c"], ["c", "new", "a"])
    assert alignment.rows == (2, None, 0)
    assert "2 of the adapter's 3 items are in this catalogue" in alignment.describe()
    assert "1 others are dropped, and 1 items that it never saw" in alignment.describe()
    tensors = {
        "head.item_bias": torch.tensor([1.0, 2.0, 6.0]),
        "head.item_ids": torch.arange(6.0).view(3, 2) + 1,
        "head.state_proj": torch.eye(3),
        "basis.taste.next_item.read_in": torch.tensor([[1.0], [2.0], [3.0]]),
        "basis.taste.next_item.read_out": torch.tensor([[4.0], [5.0], [6.0]]),
        "basis.taste.like.items": torch.arange(12.0).view(3, 2, 2) + 1,
    }
    config = config_of(taste=TasteConfig(), tasks=(Task.NEXT_ITEM, Task.LIKE))
    table = parameter_table(config, Sizes(576, {}, 3))
    aligned = aligned_tensors(tensors, alignment, table)
    assert aligned["head.item_bias"].tolist() == [6.0, 3.0, 1.0]
    assert aligned["head.item_ids"].tolist() == [[5.0, 6.0], [0.0, 0.0], [1.0, 2.0]]
    assert aligned["basis.taste.next_item.read_in"].tolist() == [[3.0], [0.0], [1.0]]
    assert aligned["basis.taste.next_item.read_out"].tolist() == [[6.0], [5.0], [4.0]]
    likes = aligned["basis.taste.like.items"].tolist()
    assert likes == [[[9.0, 10.0], [11.0, 12.0]], [[0.0, 0.0]] * 2, [[1.0, 2.0], [3.0, 4.0]]]
    assert torch.equal(aligned["head.state_proj"], torch.eye(3))


def test_where_all_items_are_new_a_private_basis_can_still_learn() -> None:
    """Else all rows were equal, and those that weigh them zero: no gradient would change either."""
    rows = torch.arange(12.0).view(3, 4)
    read_in, read_out = "basis.taste.next_item.read_in", "basis.taste.next_item.read_out"
    tensors = {read_in: rows.clone(), read_out: rows.clone(), "head.item_ids": rows.clone()}
    head = HeadConfig(dim=8, id_dim=4, item_dropout=0.0)
    table = parameter_table(config_of(head, taste=TasteConfig(read_rank=4)), Sizes(32, {}, 3))
    strangers = align_items(["a", "b", "c"], ["x", "y"])
    aligned = aligned_tensors(tensors, strangers, table)
    assert not aligned[read_in].any()  # so that the private part adds nothing until it is trained
    assert not aligned["head.item_ids"].any()
    assert not torch.equal(*aligned[read_out])
    read = aligned[read_in].requires_grad_()
    loss = (read.sum(0) @ aligned[read_out].T).log_softmax(0)[0]
    assert torch.autograd.grad(loss, read)[0].any()
    again = aligned_tensors(tensors, strangers, table)
    assert torch.equal(again[read_out], aligned[read_out])


def test_equal_catalogues_change_nothing() -> None:
    tensors = {"head.item_bias": torch.randn(4), "head.item_ids": torch.randn(4, 2)}
    alignment = align_items(["a", "b", "c", "d"], ["a", "b", "c", "d"])
    aligned = aligned_tensors(tensors, alignment, parameter_table(config_of(), Sizes(576, {}, 4)))
    assert all(torch.equal(aligned[name], tensors[name]) for name in tensors)


def test_names_from_peft_are_those_of_lora_factors_only() -> None:
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
    assert list(names_from_peft({key: torch.ones(1)})) == ["lora.model.layers.3.mlp.up_proj.A"]
    for wrong in ("base_model.model.lm_head.modules_to_save.weight", "private.lora.x.A"):
        with pytest.raises(CorruptFileError, match="no factor of a LoRA"):
            names_from_peft({wrong: torch.ones(1)})


def test_the_table_of_a_folder_follows_from_its_manifest_and_its_widths(tmp_path: Path) -> None:
    private = {"kind": "shared_basis", "rank": 3}
    adapters = {"shared": {"rank": 2, "alpha": 4}, "private": private}
    settings = {"adapters": AdaptersConfig.model_validate(adapters)}
    made = make_artefact(tmp_path / "a", **settings)
    table, tensors = made.table(), {**random_lora(0), **random_head(0)}
    for name in (*random_lora(0), "head.state_proj", "head.item_ids"):
        assert table[name].shape == tuple(tensors[name].shape)
    assert table["basis.head.A"].shape == (4, HIDDEN)
    assert table[f"basis.{MODULES[0]}.A"].shape == (3, HIDDEN)
    lacking = make_artefact(tmp_path / "b", modules=("model.gone",), **settings).table()
    assert lacking["lora.model.gone.A"].shape == (2, 0)
