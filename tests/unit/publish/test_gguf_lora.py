"""LoRAs as GGUF files: what llama.cpp adds to its weights, and what is refused."""

import copy
import os
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel

from pfm_llm.base.errors import ArtefactError, ConfigError, CorruptFileError
from pfm_llm.base.files import read_json, write_json
from pfm_llm.publish.artefact import ADAPTER_CONFIG_FILE, MANIFEST_FILE
from pfm_llm.publish.device.export import export_cat, export_gguf
from tests.support.device import Folders, write_folders
from tests.support.tiny_gguf import write_base
from tests.support.tiny_models import make_backbone, make_cohort, random_backbone


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return write_folders(make_cohort(), tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.gguf", make_backbone().model)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {one.name: torch.tensor(one.data) for one in gguf.GGUFReader(path).tensors}


def changed(base: Path, *loras: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp multiplies with: each weight plus (alpha / rank) B A of each LoRA.

    The rank is that of B, as in ``llama_adapter_lora_weight::get_scale``.
    """
    found = weights(base)
    for path in loras:
        factors = weights(path)
        fields = gguf.GGUFReader(path).fields
        alpha = float(fields["adapter.lora.alpha"].parts[-1][0])
        for name in {key.rpartition(".")[0] for key in factors}:
            a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            found[name] = found[name] + alpha / b.shape[1] * b @ a
    return found


def merged(folder: Path, to: Path) -> dict[str, torch.Tensor]:
    """The base model with a LoRA that PEFT has merged into it, as a GGUF file's weights."""
    model = PeftModel.from_pretrained(make_backbone().model, str(folder)).merge_and_unload()
    return weights(write_base(to, model))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("with_private", [False, True])
def test_llama_cpp_adds_what_peft_adds(
    use_rslora: bool, with_private: bool, base: Path, tmp_path: Path
) -> None:
    """Names, the order of rows under rotary positions, and the scale; both LoRAs in turn."""
    cohort = make_cohort(shared={"rank": 3, "alpha": 4, "use_rslora": use_rslora})
    folders = write_folders(cohort, tmp_path / "loras", weight=0.7)
    wanted = folders.shared
    if with_private:
        wanted = tmp_path / "both"
        export_cat(folders.shared, folders.private, wanted)
    private = folders.private if with_private else None
    written = export_gguf(folders.shared, private, tmp_path / "device", base)
    found, expected = changed(base, *written), merged(wanted, tmp_path / "merged.gguf")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    plain = weights(base)
    assert sum(not torch.equal(plain[name], found[name]) for name in plain) == 2 * 7


def test_one_file_of_both_adds_what_two_add(folders: Folders, base: Path) -> None:
    two = export_gguf(folders.shared, folders.private, folders.root / "two", base)
    one = export_gguf(folders.shared, folders.private, folders.root / "one", base, cat=True)
    assert [path.name for path in two] == ["shared.gguf", "private.gguf"]
    assert [path.name for path in one] == ["cat.gguf"]
    found, expected = changed(base, *one), changed(base, *two)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_the_file_says_that_it_is_an_adapter_of_this_architecture(
    folders: Folders, base: Path
) -> None:
    written = export_gguf(folders.shared, folders.private, folders.root / "device", base)
    for path, described in zip(written, ("Shared LoRA", "for its owner alone"), strict=True):
        fields = gguf.GGUFReader(path).fields
        texts = {
            key: bytes(field.parts[-1]).decode()
            for key, field in fields.items()
            if field.types == [gguf.GGUFValueType.STRING]
        }
        assert described in texts.pop("general.description")
        assert texts == {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
        }


def test_what_has_a_private_part_is_its_owners_alone(folders: Folders, base: Path) -> None:
    out = folders.root / "device"
    umask = os.umask(0)
    try:
        written = export_gguf(folders.shared, folders.private, out, base)
    finally:
        os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
    assert sorted(path.name for path in out.iterdir()) == ["private.gguf", "shared.gguf"]
    before = [path.read_bytes() for path in written]
    export_gguf(folders.shared, folders.private, out, base)
    assert [path.read_bytes() for path in written] == before


def test_a_folder_with_other_files_does_not_become_private(folders: Folders, base: Path) -> None:
    with pytest.raises(ConfigError, match="for its owner alone"):
        export_gguf(folders.shared, folders.private, folders.root, base)
    assert not list(folders.root.glob("*/*.gguf"))


def test_nothing_is_written_into_a_published_folder(folders: Folders, base: Path) -> None:
    (folders.shared / MANIFEST_FILE).touch()
    before = sorted(folders.shared.rglob("*"))
    for out in (folders.shared, folders.shared / "device"):
        with pytest.raises(ConfigError, match="published adapter's folder"):
            export_gguf(folders.shared, None, out, base)
        with pytest.raises(ConfigError, match="published adapter's folder"):
            export_cat(folders.shared, folders.private, out)
    assert sorted(folders.shared.rglob("*")) == before


def test_qwen_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    """Transformers and llama.cpp pair the same rows there."""
    cohort = make_cohort("qwen3")
    folders = write_folders(cohort, tmp_path / "loras")
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "qwen3")
    writer.add_block_count(cohort.backbone.num_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, cohort.backbone.num_layers)
    for module in cohort.adapter.modules:
        weight = cohort.backbone.model.get_submodule(module).weight
        writer.add_tensor(f"{names.get_name(module)}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (path,) = export_gguf(folders.shared, None, tmp_path / "device", tmp_path / "base.gguf")
    found = weights(path)
    tensors = cohort.client_tensors(seed=4)
    assert len(found) == 2 * len(cohort.adapter.modules)
    for module in cohort.adapter.modules:
        for factor in "AB":
            name = f"{names.get_name(module)}.weight.lora_{factor.lower()}"
            assert torch.equal(found[name], tensors[f"lora.{module}.{factor}"])


def test_a_base_model_that_is_not_its_own_is_refused(folders: Folders, tmp_path: Path) -> None:
    config = copy.deepcopy(make_backbone().model.config)
    config.intermediate_size = 64
    other = write_base(tmp_path / "other.gguf", random_backbone(config).model)
    with pytest.raises(ArtefactError, match=r"is no LoRA of .*name the GGUF file of tiny"):
        export_gguf(folders.shared, folders.private, tmp_path / "device", other)
    assert not (tmp_path / "device").exists()


def test_an_unknown_architecture_is_refused(folders: Folders, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gptneox")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ArtefactError, match=r"architecture gptneox.*convert_lora_to_gguf"):
        export_gguf(folders.shared, None, tmp_path / "device", tmp_path / "base.gguf")


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF\x03\0\0\0" + bytes(16)])
def test_what_is_no_base_model_is_refused(
    content: bytes | None, folders: Folders, tmp_path: Path
) -> None:
    path = tmp_path / "base.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="no GGUF file of a language model"):
        export_gguf(folders.shared, None, tmp_path / "device", path)
    assert not (tmp_path / "device").exists()


def test_the_base_model_is_to_be_named_unless_it_is_embedded(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"belongs to tiny; pass base \(--base\)"):
        export_gguf(folders.shared, None, folders.root / "device")
    tree = read_json(folders.shared / ADAPTER_CONFIG_FILE)
    tree["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    write_json(folders.shared / ADAPTER_CONFIG_FILE, tree)
    with pytest.raises(ConfigError, match="SmolLM2-135M-Instruct and tiny"):
        export_gguf(folders.shared, folders.private, folders.root / "device")
