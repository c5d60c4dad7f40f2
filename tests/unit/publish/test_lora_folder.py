"""Two LoRA folders as one: what plain PEFT computes with it, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pfm_llm.base.errors import ArtefactError, ConfigError, CorruptFileError
from pfm_llm.model.lora import EXPORTED_SETTINGS
from pfm_llm.publish.artefact import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from pfm_llm.publish.device.export import export_cat
from pfm_llm.publish.device.lora_folder import FolderLora
from tests.support.device import Folders, write_folders
from tests.support.tiny_models import make_cohort

TOKENS = torch.tensor([[3, 50, 7, 8, 61, 2]])


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(make_cohort(), tmp_path)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits[0]
    return found


def loaded(folders: Folders, model: Any, *names: str) -> Any:
    """The base model in plain PEFT, with the adapters of some folders active at once."""
    first, *others = names
    peft = PeftModel.from_pretrained(
        copy.deepcopy(model), str(folders.root / first), adapter_name=first
    )
    for name in others:
        peft.load_adapter(str(folders.root / name), adapter_name=name)
    peft.base_model.set_adapter(list(names))
    return peft.eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_lora_of_both_computes_what_both_compute(
    architecture: str, use_rslora: bool, tmp_path: Path
) -> None:
    cohort = make_cohort(architecture, shared={"rank": 3, "alpha": 4, "use_rslora": use_rslora})
    folders = write_folders(cohort, tmp_path, weight=0.7)
    export_cat(folders.shared, folders.private, tmp_path / "cat")
    model = cohort.backbone.model
    both = logits(loaded(folders, model, "shared", "private"))
    torch.testing.assert_close(logits(loaded(folders, model, "cat")), both, atol=1e-5, rtol=1e-5)
    for one in ("shared", "private"):
        assert float((logits(loaded(folders, model, one)) - both).abs().max()) > 1e-2


def test_it_is_the_lora_that_peft_itself_concatenates(folders: Folders) -> None:
    cohort = make_cohort()
    export_cat(folders.shared, folders.private, folders.root / "cat")
    peft = loaded(folders, cohort.backbone.model, "shared", "private")
    peft.add_weighted_adapter(["shared", "private"], [1.0, 1.0], "of_peft", combination_type="cat")
    peft.load_adapter(str(folders.root / "cat"), adapter_name="ours")
    for module in cohort.adapter.modules:
        layer = peft.get_base_model().get_submodule(module)
        expected, found = (layer.get_delta_weight(name) for name in ("of_peft", "ours"))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lacks", ["shared", "private"])
def test_a_module_that_one_of_both_does_not_adapt_keeps_the_other(
    lacks: str, folders: Folders
) -> None:
    module = "model.layers.3.mlp.down_proj"
    assert module in FolderLora.read(folders.shared).factors
    change_tensors(
        folders.root / lacks,
        lambda tensors: [tensors.pop(key) for key in list(tensors) if module in key],
    )
    joined = FolderLora.read(folders.shared).joined(FolderLora.read(folders.private))
    for name, (a, b) in joined.factors.items():
        assert (len(a), b.shape[1]) == (5, 5), name
    other = FolderLora.read(folders.root / ({"shared", "private"} - {lacks}).pop())
    a, b = joined.factors[module]
    alone = other.factors[module]
    torch.testing.assert_close(b @ a, other.scale * alone[1] @ alone[0])


def test_a_lora_that_is_written_is_read_again(folders: Folders) -> None:
    lora = FolderLora.read(folders.shared)
    lora.write(folders.root / "again")
    again = FolderLora.read(folders.root / "again")
    assert (again.base_name, again.rank, again.scale) == (lora.base_name, lora.rank, 1.0)
    assert again.factors.keys() == lora.factors.keys()
    for module, (a, b) in again.factors.items():
        assert torch.equal(a, lora.factors[module][0])
        assert torch.equal(b, lora.factors[module][1] * lora.scale)


def test_its_folder_is_its_owners_alone(folders: Folders) -> None:
    written = export_cat(folders.shared, folders.private, folders.root / "cat")
    assert sorted(path.name for path in written) == [ADAPTER_CONFIG_FILE, ADAPTER_FILE]
    assert (folders.root / "cat").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in written)
    settings = json.loads((folders.root / "cat" / ADAPTER_CONFIG_FILE).read_text())
    assert settings.keys() == set(EXPORTED_SETTINGS)
    before = [path.read_bytes() for path in written]
    export_cat(folders.shared, folders.private, folders.root / "cat")
    assert [path.read_bytes() for path in written] == before


def test_it_takes_over_no_folder_with_other_files(folders: Folders) -> None:
    (folders.root / "cat").mkdir()
    (folders.root / "cat" / "notes.txt").touch()
    mode = (folders.root / "cat").stat().st_mode
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        export_cat(folders.shared, folders.private, folders.root / "cat")
    assert (folders.root / "cat").stat().st_mode == mode


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_more_than_a_plain_lora_is_refused(changes: dict[str, Any], folders: Folders) -> None:
    change_config(folders.shared, **changes)
    with pytest.raises(ArtefactError, match=f"has {next(iter(changes))}.*only a plain LoRA"):
        FolderLora.read(folders.shared)


def test_damaged_folders_are_refused(folders: Folders) -> None:
    with pytest.raises(CorruptFileError, match=r"adapter_config\.json is missing"):
        FolderLora.read(folders.root)
    change_config(folders.shared, r="3")
    with pytest.raises(ArtefactError, match="lacks r, lora_alpha"):
        FolderLora.read(folders.shared)
    change_config(folders.shared, r=4)
    with pytest.raises(ArtefactError, match="no two factors of rank 4"):
        FolderLora.read(folders.shared)
    change_config(folders.shared, r=3)
    change_tensors(folders.shared, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(ArtefactError, match="no two factors of rank 3"):
        FolderLora.read(folders.shared)


def test_loras_of_two_base_models_are_not_joined(folders: Folders) -> None:
    change_config(folders.private, base_model_name_or_path="other")
    with pytest.raises(ArtefactError, match="belongs to tiny and the other to other"):
        export_cat(folders.shared, folders.private, folders.root / "cat")
    assert not (folders.root / "cat").exists()


def test_loras_of_other_widths_are_not_joined(folders: Folders) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".lora_A." in key]:
            tensors[key] = tensors[key][:, :-1].contiguous()

    change_tensors(folders.private, narrow)
    with pytest.raises(ArtefactError, match="different widths"):
        export_cat(folders.shared, folders.private, folders.root / "cat")
