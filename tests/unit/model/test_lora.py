"""Shared and private LoRA: where they sit, how they start, and the PEFT folder that comes out."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pfm_llm.base.errors import BackboneError, ConfigError
from pfm_llm.config.choices import Dtype
from pfm_llm.config.model import AdaptersConfig, HeadConfig
from pfm_llm.config.schema import BackboneConfig
from pfm_llm.model.backbone import Backbone, load_backbone
from pfm_llm.model.batches import collate
from pfm_llm.model.cohort import Parts
from pfm_llm.model.lora import EXPORTED_SETTINGS, DualAdapter, settings_from_peft
from pfm_llm.protocol.types import Group, of_group
from tests.support.peft_reference import load_private
from tests.support.tables import Drawn
from tests.support.tiny import Tiny
from tests.support.tiny_models import (
    ARCHITECTURES,
    CLIENT_WINDOWS,
    NUM_LAYERS,
    gpt2_backbone,
    make_backbone,
    make_cohort,
    private_part,
    shared_tensors,
    stack,
    stirred,
)

LLAMA_LINEARS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),  # 2 of 4 heads
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}


def _adapter(architecture: str = "llama", **settings: object) -> DualAdapter:
    return DualAdapter(make_backbone(architecture), _config(**settings))


def _config(**settings: object) -> AdaptersConfig:
    return AdaptersConfig.model_validate({"num_layers": 2, **settings})


def _shared(seed: int = 0, **settings: object) -> Drawn:
    """Shared LoRA and basis before training."""
    found = shared_tensors(_adapter(**settings), _config(**settings), seed=seed)
    return {name: value for name, value in found.items() if not name.startswith("head.")}


def test_all_linear_finds_every_linear_layer_of_the_adapted_layers() -> None:
    assert _adapter().modules == {
        f"model.layers.{layer}.{name}": shape
        for layer in (NUM_LAYERS - 2, NUM_LAYERS - 1)
        for name, shape in LLAMA_LINEARS.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_works_on_every_architecture(architecture: str) -> None:
    backbone = make_backbone(architecture)
    adapter = DualAdapter(backbone, AdaptersConfig(num_layers=3))
    layers = backbone.model.get_submodule(backbone.layers_path)
    expected = {
        f"{backbone.layers_path}.{layer}.{name}"
        for layer in range(1, NUM_LAYERS)
        for name, module in layers[layer].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert adapter.modules.keys() == expected
    _, top = backbone.split(3)
    for name, path in adapter.top_paths().items():
        whole = backbone.model.get_submodule(name)
        assert top.get_submodule(path).weight is whole.weight
        assert adapter.modules[name] == (whole.in_features, whole.out_features)


@pytest.mark.parametrize("targets", ["q_proj", ("q_proj",), ["q_proj"]])
def test_named_targets_are_the_only_ones(targets: object) -> None:
    modules = _adapter(targets=targets).modules
    assert list(modules) == [f"model.layers.{n}.self_attn.q_proj" for n in (2, 3)]


def test_modules_that_are_not_there_are_an_error_that_names_those_there_are() -> None:
    with pytest.raises(BackboneError, match=r"tiny-gpt_neox .*'q_proj'.*adapters.targets.*dense"):
        _adapter("gpt_neox", targets="q_proj")


def test_modules_that_are_no_linear_layers_are_an_error() -> None:
    with pytest.raises(BackboneError, match=r"linear layers.*q_proj"):
        _adapter(targets=["act_fn"])


@pytest.mark.parametrize("targets", ["all-linear", "c_attn"])
def test_a_model_whose_layers_are_no_linear_layers_is_refused(targets: str) -> None:
    with pytest.raises(BackboneError, match=r"linear layers"):
        DualAdapter(gpt2_backbone(), AdaptersConfig(num_layers=2, targets=targets))


def test_more_adapted_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(BackboneError, match=r"has 4 layers.*adapters\.num_layers.*5"):
        _adapter(num_layers=NUM_LAYERS + 1)


def test_the_backbone_is_not_changed() -> None:
    backbone = make_backbone()
    before = [name for name, _ in backbone.model.named_modules()]
    DualAdapter(backbone, AdaptersConfig(num_layers=2)).peft_model()
    assert [name for name, _ in backbone.model.named_modules()] == before
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_initial_factors_are_distributed_as_peft_draws_them() -> None:
    """Uniform in ±1/sqrt(in_features), standard deviation 1/sqrt(3 in_features); B is zero."""
    tensors = _shared(shared={"rank": 16, "alpha": 16})
    model = make_backbone().model
    peft = get_peft_model(model, LoraConfig(r=16, target_modules=["down_proj"]))
    reference = peft.get_submodule("base_model.model.model.layers.3.mlp.down_proj.lora_A.default")
    for a in (tensors["lora.model.layers.3.mlp.down_proj.A"], reference.weight.detach()):
        assert a.shape == (16, 48)
        assert 0.98 / math.sqrt(48) < float(a.abs().max()) <= 1 / math.sqrt(48)
        assert float(a.std()) == pytest.approx(1 / math.sqrt(3 * 48), rel=0.05)
        assert abs(float(a.mean())) < 0.01
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))
    assert all(tensor.dtype is torch.float32 for tensor in tensors.values())


def test_same_seed_same_bits_and_every_module_and_seed_its_own() -> None:
    shared, equal = _shared(), _shared()
    assert all(torch.equal(shared[name], equal[name]) for name in shared)
    drawn = [shared[name] for name in shared if name.endswith("_proj.A") and "q_proj" in name]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], _shared(seed=1)[next(iter(shared))])


def test_the_scale_is_alpha_over_rank() -> None:
    adapter = _adapter(shared={"rank": 8, "alpha": 4}, private={"rank": 2, "alpha": 5})
    assert adapter.scale() == 0.5


@pytest.fixture
def tiny_backbone(tiny: Tiny) -> Backbone:
    return load_backbone(BackboneConfig(name=str(tiny.model), dtype=Dtype.FLOAT32))


def test_an_exported_folder_loads_in_plain_peft_to_our_hidden_states(
    tiny: Tiny, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)``."""
    config = AdaptersConfig.model_validate({"num_layers": 2, "shared": {"rank": 3, "alpha": 7}})
    adapter = DualAdapter(tiny_backbone, config)
    shared = stirred(of_group(shared_tensors(adapter, config), Group.LORA), 1)
    adapter.export_shared(shared, tmp_path / "out", "org/base")
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = tiny_backbone.decoder(input_ids=tokens).last_hidden_state
        found = plain.get_base_model().model(input_ids=tokens).last_hidden_state
        expected = _our_states(tiny_backbone, adapter, config, shared, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 0.1


def _our_states(
    backbone: Backbone,
    adapter: DualAdapter,
    config: AdaptersConfig,
    shared: dict[str, torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Trunk, then the top with each linear layer's weight changed by scale * B A."""
    trunk, top = backbone.split(config.num_layers)
    for name, path in adapter.top_paths().items():
        linear = top.get_submodule(path)
        change = shared[f"lora.{name}.B"] @ shared[f"lora.{name}.A"] * adapter.scale()
        linear.weight = torch.nn.Parameter(linear.weight + change)
    states = trunk(input_ids=tokens, use_cache=False).last_hidden_state
    hidden: torch.Tensor = top(inputs_embeds=states, use_cache=False).last_hidden_state
    return hidden


def test_an_export_does_not_depend_on_the_order_of_a_set(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    config = AdaptersConfig(num_layers=2)
    adapter = DualAdapter(tiny_backbone, config)
    adapter.export_shared(shared_tensors(adapter, config), tmp_path / "out", "org/base")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 7
    assert settings["target_modules"] == sorted(settings["target_modules"])


def test_an_exported_folder_holds_the_shared_adapter_and_nothing_else(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    config = AdaptersConfig(num_layers=2)
    adapter = DualAdapter(tiny_backbone, config)
    shared = stirred(of_group(shared_tensors(adapter, config), Group.LORA), 1)
    part = private_part(config, adapter, HeadConfig(dim=8))
    private = stirred(part.initial("u"), 2)
    peft = adapter.peft_model()
    # It exists elsewhere, and must not come along.
    load_private(adapter, peft, part, {**shared, **private})
    everything = {**shared, **private, "head.item_bias": torch.ones(3)}
    for _ in range(2):  # the second export replaces the first
        adapter.export_shared(everything, tmp_path / "out", "org/base")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (8, 16, "CAUSAL_LM")
    assert settings["modules_to_save"] is None
    content = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{name[5:-2]}.lora_{name[-1]}.weight": value
        for name, value in shared.items()
    }
    assert content.keys() == expected.keys()
    assert all(torch.equal(content[name], value) for name, value in expected.items())
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for name, value in private.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert value.to(dtype).view(torch.uint8).numpy().tobytes()[:64] not in written, name


def test_a_shared_basis_is_folded_into_a_private_peft_adapter() -> None:
    """PEFT with the basis as its private A gives the hidden states of the stacked pass."""
    cohort = make_cohort(private={"rank": 2, "alpha": 5, "head_rank": 2, "kind": "shared_basis"})
    tensors = cohort.client_tensors(1)
    peft = cohort.adapter.peft_model().eval()
    cohort.adapter.load_shared(peft, tensors)
    load_private(cohort.adapter, peft, cohort.private, tensors)
    name = next(iter(cohort.adapter.modules))
    folded = peft.get_base_model().get_submodule(f"{name}.lora_A.private").weight
    assert torch.equal(folded, tensors[f"basis.{name}.A"])
    (window,) = CLIENT_WINDOWS[0]
    plain = {
        n: t
        for n, t in tensors.items()
        if not n.startswith(("head.item_ids", "head.context", "private.head"))
    }
    batch = collate([[window]], [[cohort.trunk_states(window)]], last_only=True)
    scores = cohort.model.scores(batch, stack([plain]), Parts())
    tokens = torch.from_numpy(window.tokens).long()[None]
    with torch.no_grad():
        hidden = peft.get_base_model().model(input_ids=tokens).last_hidden_state[0, -1]
    u = tensors["head.state_proj"] @ ((hidden - cohort.normaliser.mean) @ cohort.normaliser.basis)
    u = u * len(window) / (len(window) + tensors["head.state_log_n"].exp())
    expected = 0.5 / 8**0.5 * cohort.item_texts @ (tensors["head.item_proj"].T @ u)
    torch.testing.assert_close(
        scores[0], expected + tensors["head.item_bias"], atol=1e-5, rtol=1e-5
    )


def test_loading_what_the_model_has_no_place_for_is_an_error() -> None:
    adapter = _adapter(targets="q_proj")
    peft = adapter.peft_model()
    strange = {"lora.model.layers.0.mlp.up_proj.A": torch.zeros(8, 32)}
    with pytest.raises(BackboneError, match="PEFT did not take"):
        adapter.load_shared(peft, strange)


def test_both_adapters_are_active_and_share_the_backbones_weights() -> None:
    backbone = make_backbone()
    peft = DualAdapter(backbone, AdaptersConfig(num_layers=1)).peft_model()
    assert peft.base_model.active_adapters == ["shared", "private"]
    storage = {p.data_ptr() for p in backbone.model.parameters()}
    base = [p for n, p in peft.named_parameters() if "lora_" not in n]
    assert {p.data_ptr() for p in base} == storage
    assert isinstance(backbone.model.config, LlamaConfig)


def test_an_exported_config_holds_what_older_peft_knows_and_nothing_else(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """PEFT refuses a setting that it does not know. These are fields of LoraConfig in 0.13."""
    adapter = DualAdapter(tiny_backbone, AdaptersConfig(num_layers=2))
    adapter.export_shared(shared_tensors(adapter, AdaptersConfig()), tmp_path / "out", "org/base")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert tuple(settings) == EXPORTED_SETTINGS
    assert {key for key, value in settings.items() if value is None} == {"modules_to_save"}


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_rank_stabilised_adapter_is_plain_peft_with_its_scale(
    rank: int, tiny: Tiny, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    tree = {"num_layers": 2, "shared": {"rank": rank, "alpha": 6, "use_rslora": True}}
    config = AdaptersConfig.model_validate(tree)
    adapter = DualAdapter(tiny_backbone, config)
    assert adapter.scale() == 6 / rank**0.5
    shared = stirred(of_group(shared_tensors(adapter, config), Group.LORA), 1)
    adapter.export_shared(shared, tmp_path / "out", "org/base")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.model), tmp_path / "out"
    ).eval()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        found = plain.get_base_model().model(input_ids=tokens).last_hidden_state
        expected = _our_states(tiny_backbone, adapter, config, shared, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_settings_without_rank_stabilisation_are_dumped_as_they_were() -> None:
    """Hashes of settings and manifests made before there was the choice stay as they are."""
    assert AdaptersConfig().model_dump()["shared"] == {"rank": 8, "alpha": 16, "dropout": 0.0}
    on = AdaptersConfig.model_validate({"shared": {"use_rslora": True}})
    assert AdaptersConfig.model_validate(on.model_dump()) == on
    assert on.model_dump()["shared"]["use_rslora"] is True


def test_a_lora_config_of_peft_stands_for_settings() -> None:
    given = LoraConfig(
        r=6, lora_alpha=5, lora_dropout=0.1, use_rslora=True,
        target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    shared = {"rank": 6, "alpha": 5, "dropout": 0.1, "use_rslora": True}
    assert settings_from_peft(given) == {"shared": shared, "targets": ["q_proj", "v_proj"]}
    assert AdaptersConfig.model_validate(settings_from_peft(given)).targets == ("q_proj", "v_proj")
    assert settings_from_peft(LoraConfig(target_modules="all-linear"))["targets"] == "all-linear"
    assert "targets" not in settings_from_peft(LoraConfig())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("layers_to_transform", [1]),
        ("init_lora_weights", "pissa"),
        ("task_type", "SEQ_CLS"),
        ("exclude_modules", ["lm_head"]),
    ],
)
def test_what_cannot_be_trained_of_a_lora_config_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"adapters.shared: the LoraConfig sets {setting}, which"):
        settings_from_peft(LoraConfig(**{setting: value}))
