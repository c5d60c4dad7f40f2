"""The backbone: its two views compose to the whole, and bad models end in a clear error."""

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pfm_llm.base.errors import ArtefactError, BackboneError
from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Dtype, Pooling
from pfm_llm.config.schema import BackboneConfig
from pfm_llm.model.backbone import (
    KERNELS_KEPT,
    Backbone,
    hash_weights,
    load_backbone,
    pad_tokens,
    resolve_dtype,
    unloaded_backbone,
)
from tests.support.tiny import Tiny
from tests.support.tiny_models import (
    ARCHITECTURES,
    HIDDEN,
    NUM_LAYERS,
    SLIDING_WINDOW,
    VOCABULARY,
    gpt2_backbone,
    make_backbone,
)

TEXT = torch.arange(3, 3 + 3 * SLIDING_WINDOW)[None].repeat(2, 1)


@pytest.mark.parametrize("num_top", [1, 2, NUM_LAYERS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_trunk_and_top_compose_to_the_whole_model(architecture: str, num_top: int) -> None:
    """On a text three times as long as the sliding windows of two of the models."""
    backbone = make_backbone(architecture)
    trunk, top = backbone.split(num_top)
    whole = backbone.decoder(input_ids=TEXT, use_cache=False).last_hidden_state
    states = trunk(input_ids=TEXT, use_cache=False).last_hidden_state
    composed = top(inputs_embeds=states, use_cache=False).last_hidden_state
    torch.testing.assert_close(composed, whole, atol=1e-5, rtol=1e-5)
    assert float((states - whole).abs().max()) > 0.1  # the top is not idle


@pytest.mark.parametrize("architecture", ["qwen2_sliding", "gemma3"])
@torch.no_grad()
def test_sliding_layers_slide(architecture: str) -> None:
    """With one adapted layer, the top is a sliding one: what lies far back does not reach it."""
    backbone = make_backbone(architecture)
    _, top = backbone.split(1)
    states = torch.randn(1, 10, HIDDEN, generator=torch.Generator().manual_seed(0))
    changed = states.clone()
    changed[0, 0] += 1
    difference = (
        top(inputs_embeds=states, use_cache=False).last_hidden_state
        - top(inputs_embeds=changed, use_cache=False).last_hidden_state
    )[0].abs().amax(1)  # fmt: skip
    assert difference[:SLIDING_WINDOW].min() > 1e-4
    assert difference[SLIDING_WINDOW:].max() == 0


def test_views_share_the_tensors_and_leave_the_model_as_it_is() -> None:
    backbone = make_backbone("gemma3")
    storage = {p.data_ptr() for p in backbone.model.parameters()}
    before = list(backbone.model.config.layer_types)
    trunk, top = backbone.split(1)
    assert {p.data_ptr() for view in (trunk, top) for p in view.parameters()} <= storage
    top.set_submodule("layers.0.mlp.down_proj", nn.Identity())
    assert isinstance(backbone.decoder.layers[-1].mlp.down_proj, nn.Linear)
    assert backbone.model.config.layer_types == before
    assert backbone.num_layers == len(backbone.decoder.layers) == NUM_LAYERS
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absolute_positions_are_refused(dtype: torch.dtype) -> None:
    """The top view of a GPT-2 would add its position embeddings a second time."""
    with pytest.raises(BackboneError, match=r"gpt2 .*cannot be split.*rotary"):
        gpt2_backbone(dtype).split(2)


def test_more_adapted_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(BackboneError, match=r"tiny-llama has 4 layers.*adapters.num_layers.* 5"):
        make_backbone().split(NUM_LAYERS + 1)
    assert make_backbone().first_top_layer(NUM_LAYERS) == 0


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                    num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    model.model.layers = model.model.layers[:1]
    with pytest.raises(BackboneError, match=r"no list of 2 decoder layers.*Llama"):
        Backbone(model, None, "broken", "0")


def test_padding_on_the_right_does_not_change_what_stands_left_of_it() -> None:
    assert pad_tokens([[5], [1, 2, 3]]).tolist() == [[5, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("batch_tokens", [1, 12, 10_000])
@pytest.mark.parametrize("pooling", Pooling)
def test_states_of_texts_do_not_depend_on_batches(batch_tokens: int, pooling: Pooling) -> None:
    backbone = make_backbone("qwen2_sliding")
    pieces = [[5, 6, 7], [1], [9] * 12, [4, 4], [1]]
    states = backbone.text_states(pieces, batch_tokens, pooling)
    assert states.shape == (5, HIDDEN)
    assert states.dtype is torch.float32
    for piece, state in zip(pieces, states, strict=True):
        with torch.no_grad():
            hidden = backbone.decoder(input_ids=torch.tensor([piece])).last_hidden_state[0]
        expected = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    assert backbone.text_states([], 10, pooling).shape == (0, HIDDEN)


def test_properties_say_what_the_model_is() -> None:
    backbone = make_backbone("gpt_neox", torch.bfloat16)
    assert (backbone.hidden_size, backbone.max_tokens) == (HIDDEN, 128)
    assert (backbone.dtype, backbone.device.type) == (torch.bfloat16, "cpu")
    assert backbone.layers_path == "gpt_neox.layers"
    assert not backbone.is_embedded
    assert backbone.model.get_input_embeddings().num_embeddings == VOCABULARY


def test_a_local_folder_loads_and_never_gives_its_path_away(tiny: Tiny) -> None:
    backbone = load_backbone(BackboneConfig(name=str(tiny.model), dtype=Dtype.FLOAT32))
    assert backbone.portable_name == tiny.model.name
    assert backbone.dtype is torch.float32
    assert len(backbone.tokenizer_hash) == len(backbone.weights_hash) == 64
    plain = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert backbone.weights_hash == hash_weights(plain)
    half = load_backbone(BackboneConfig(name=str(tiny.model), dtype=Dtype.BFLOAT16))
    assert half.dtype is torch.bfloat16
    assert half.weights_hash == backbone.weights_hash  # of what is stored, not of the cast


def test_the_hash_sees_a_single_changed_weight() -> None:
    model = make_backbone().model
    before = hash_weights(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert hash_weights(model) != before


def test_the_portable_name_of_the_embedded_model_is_its_hub_id() -> None:
    embedded = Backbone(make_backbone().model, None, "smollm2-135m", "0")
    assert embedded.portable_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert embedded.is_embedded


def test_a_model_that_is_not_there_names_what_would_be(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "nobody/nothing"):
        with pytest.raises(BackboneError, match=rf"{name}.*smollm2-135m.*Hub id.*local folder"):
            load_backbone(BackboneConfig(name=name))


def test_a_damaged_weights_file_is_a_backbone_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny.model.iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.suffix == ".safetensors" else len(content)
        (folder / file.name).write_bytes(content[:cut])
    with pytest.raises(BackboneError, match="cannot load backbone"):
        load_backbone(BackboneConfig(name=str(folder)))


def test_a_folder_without_tokenizer_is_a_backbone_error(tmp_path: Path) -> None:
    make_backbone().model.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cannot load backbone"):
        load_backbone(BackboneConfig(name=str(tmp_path)))


def test_dtype_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_dtype(Dtype.AUTO, cpu) is expected
        assert resolve_dtype(Dtype.FLOAT16, cpu) is torch.float16


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny.model, tmp_path / "base"))


def with_settings(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_base_is_never_run_and_nobody_is_asked(
    file: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> NoReturn:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    names = {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"}
    tokenizer = {"AutoTokenizer": ["code.X", "code.X"]}
    path = base / file
    tree = json.loads(path.read_text())
    is_config = file == "config.json"
    tree["auto_map"] = names if is_config else tokenizer
    tree |= {"model_type": "nobody-knows"} if is_config else {"tokenizer_class": "NobodyKnows"}
    path.write_text(json.dumps(tree))
    with pytest.raises(BackboneError, match="Python code of its own folder, which is never run"):
        load_backbone(BackboneConfig(name=str(base)))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_as_base_is_refused(base: Path) -> None:
    torch.save({"x": torch.ones(1)}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"cannot load backbone.*safetensors"):
        load_backbone(BackboneConfig(name=str(base)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers"),
        ({"hidden_size": 1 << 16, "head_dim": 8}, "ask for more weights than it holds"),
        ({"num_hidden_layers": 4}, "lacks the weights"),
        ({"num_attention_heads": 0}, "cannot load backbone"),
        ({"vocab_size": "x"}, "cannot load backbone"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(
    changes: dict[str, object], problem: str, base: Path
) -> None:
    with_settings(base, **changes)
    with pytest.raises(BackboneError, match=problem):
        load_backbone(BackboneConfig(name=str(base)))


def test_weights_are_known_before_they_are_loaded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BackboneConfig(name=str(base), dtype=Dtype.FLOAT32)
    seen: list[str] = []
    assert load_backbone(config, check_weights=seen.append).weights_hash == seen[0]

    def refuse(_: str) -> NoReturn:
        raise ArtefactError("not wanted")

    def load(*_: object, **__: object) -> NoReturn:
        raise AssertionError("loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ArtefactError, match="not wanted"):
        load_backbone(config, check_weights=refuse)


def test_ctrl_c_while_a_model_is_loaded_is_no_error_about_the_model(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> NoReturn:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of a storage") from None
        raise AssertionError("not interrupted")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(KeyboardInterrupt):
        load_backbone(BackboneConfig(name=str(base)))


def test_an_unloaded_backbone_has_the_shapes_of_the_loaded_one(tiny: Tiny) -> None:
    config = BackboneConfig(name=str(tiny.model), dtype=Dtype.FLOAT32)
    unloaded, loaded = unloaded_backbone(config), load_backbone(config)
    shapes = [
        {name: tuple(weight.shape) for name, weight in one.model.named_parameters()}
        for one in (unloaded, loaded)
    ]
    assert shapes[0] == shapes[1]
    assert (unloaded.layers_path, unloaded.dtype) == (loaded.layers_path, torch.float32)
    assert unloaded.device.type == "meta"


def test_the_kernels_that_are_kept_are_bounded_unless_the_environment_says(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    load_backbone(BackboneConfig(name=str(tiny.model)))
    assert os.environ["LRU_CACHE_CAPACITY"] == str(KERNELS_KEPT)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_reading_texts_is_shown_by_their_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(6, "reading", unit="tokens") as progress:
        make_backbone("qwen2_sliding").text_states([[1], [2, 3], [4, 5, 6]], 4, progress=progress)
    assert progress.count == 6
    assert "reading: 6/6" in caplog.text
