"""The frozen language model, its tokenizer, and its two views: trunk and top.

The **trunk** is the embedding and the layers that no adapter touches, without the final norm;
the **top** is the adapted layers and the final norm, fed through ``inputs_embeds``. Both share
the tensors of one Hugging Face model, so masks, rotary embeddings and attention stay the
library's. This is the only module that calls ``from_pretrained`` on a language model.
"""

import contextlib
import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pfm_llm.base import assets, files
from pfm_llm.base.errors import BackboneError, PfmError
from pfm_llm.base.locks import LOADING
from pfm_llm.base.progress import Progress
from pfm_llm.config.choices import Dtype, Pooling
from pfm_llm.config.schema import BackboneConfig

EMBEDDED = {"smollm2-135m": assets.smollm2_135m}
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}

KERNELS_KEPT = 128
"""Compiled kernels that oneDNN keeps, and as many its layer in PyTorch. A kernel of bfloat16 takes
about 0.6 MB, and every new length of a batch needs a few dozen of them. By default 1024 are kept,
which is 0.6 GB; lengths seldom come again, so that most of these are never used."""
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

_MAX_LAYERS = 1000
_SELF_CHECK_TOKENS = 8
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}


class Backbone:
    """A frozen causal language model and its tokenizer.

    Attributes:
        model: The whole ``AutoModelForCausalLM``, in eval mode, no parameter trainable.
        tokenizer: Its tokenizer.
        name: The name in the config, never a path of the local cache.
        weights_hash: SHA-256 over its parameters as stored, before any cast to another dtype.
        dtype: The compute dtype.
        device: The device of the model.
        hidden_size: Width of a hidden state.
        layers_path: Path of the list of decoder layers in ``model``, such as ``model.layers``.
        num_layers: Number of decoder layers.
        is_embedded: Whether the weights come from a package registry instead of the Hub.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, weights_hash: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.weights_hash = weights_hash
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self._decoder_path, self._layers_name, self._norm_name = _find_parts(model)
        self.layers_path = f"{self._decoder_path}.{self._layers_name}"
        self.num_layers = len(model.get_submodule(self.layers_path))
        self.is_embedded = name in EMBEDDED

    @property
    def max_tokens(self) -> int:
        """Longest input that the position embeddings allow."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 1 << 30

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary and its ids, in hex."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    @property
    def portable_name(self) -> str:
        """The Hub id, or the last part of a local folder's path."""
        name = HUB_NAMES.get(self.name, self.name)
        return Path(name).name if Path(name).exists() else name

    @property
    def decoder(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.get_submodule(self._decoder_path)

    def first_top_layer(self, num_top: int) -> int:
        """Index of the lowest of the ``num_top`` highest layers.

        Raises:
            BackboneError: There are fewer layers.
        """
        if num_top > self.num_layers:
            raise BackboneError(
                f"{self.name} has {self.num_layers} layers, adapters.num_layers asks for "
                f"{num_top}; lower it"
            )
        return self.num_layers - num_top

    def split(self, num_top: int) -> tuple[nn.Module, nn.Module]:
        """Make the trunk and the top view.

        Args:
            num_top: How many layers, counted from the top, belong to the top view.

        Returns:
            ``trunk`` (token ids [N, T] to states [N, T, d] below the top layers) and ``top``
            (``inputs_embeds`` [N, T, d] to normalised states [N, T, d]). They share tensors
            with ``model`` but no module, so either can be changed without touching it.

        Raises:
            BackboneError: Fewer layers than asked for, or an architecture whose two views do
                not compose to the whole model.
        """
        below = self.first_top_layer(num_top)
        trunk = self._view(slice(0, below))
        setattr(trunk, self._norm_name, nn.Identity())
        top = self._view(slice(below, None))
        self._check_split(trunk, top)
        return trunk, top

    @torch.no_grad()
    def text_states(
        self,
        pieces: list[list[int]],
        batch_tokens: int,
        pooling: Pooling = Pooling.LAST,
        progress: Progress | None = None,
        layers: nn.Module | None = None,
    ) -> torch.Tensor:
        """The state of each text: that of its last token, or the mean over its tokens.

        Args:
            pieces: Token ids of each text; none empty.
            batch_tokens: Bound on padded tokens per forward pass.
            pooling: Which of both.
            progress: Counts the tokens that are read.
            layers: A view of the model (`split`) whose last state is taken; None: the whole model,
                its final norm included.

        Returns:
            States [len(pieces), d], float32 on the CPU.
        """
        states = torch.empty(len(pieces), self.hidden_size)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        start = 0
        while start < len(order):
            # The texts are sorted by length, so the last one of a batch sets the padding.
            stop = start + 1
            while (
                stop < len(order) and (stop + 1 - start) * len(pieces[order[stop]]) <= batch_tokens
            ):
                stop += 1
            rows = order[start:stop]
            tokens = pad_tokens([pieces[i] for i in rows]).to(self.device)
            hidden = (layers or self.decoder)(input_ids=tokens, use_cache=False).last_hidden_state
            lengths = torch.tensor([len(pieces[i]) for i in rows], device=self.device)
            if pooling is Pooling.LAST:
                pooled = hidden[torch.arange(len(rows), device=self.device), lengths - 1].float()
            else:
                is_text = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
                pooled = (hidden.float() * is_text[..., None]).sum(1) / lengths[:, None]
            states[torch.tensor(rows)] = pooled.cpu()
            if progress is not None:
                progress.update(sum(len(pieces[i]) for i in rows))
            start = stop
        return states

    def _view(self, layers: slice) -> Any:
        shared: dict[int, Any] = {id(p): p for p in self.decoder.parameters()}
        shared |= {id(b): b for b in self.decoder.buffers()}
        view = copy.deepcopy(self.decoder, shared)
        kept = list(getattr(view, self._layers_name))[layers]
        setattr(view, self._layers_name, nn.ModuleList(kept))
        view.config = copy.deepcopy(self.decoder.config)
        view.config.num_hidden_layers = len(kept)
        if getattr(view.config, "layer_types", None) is not None:
            view.config.layer_types = list(self.decoder.config.layer_types)[layers]
        return view

    @torch.no_grad()
    def _check_split(self, trunk: Any, top: Any) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = torch.arange(_SELF_CHECK_TOKENS, device=self.device)[None] % vocabulary
        whole = self.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        states = trunk(input_ids=tokens, use_cache=False).last_hidden_state
        composed = top(inputs_embeds=states, use_cache=False).last_hidden_state
        # A ratio of means: with a maximum, a few huge dimensions would hide all others.
        difference = (whole - composed).float().abs().mean() / whole.float().abs().mean()
        if not difference <= _SELF_CHECK_TOLERANCE[self.dtype]:
            raise BackboneError(
                f"{self.name} ({type(self.model).__name__}) cannot be split into trunk and top: "
                f"their composition differs from the whole model by {float(difference):.2g}; "
                "choose a decoder with rotary position embeddings (Llama, Qwen, Gemma, GPT-NeoX)"
            )


def with_random_weights(backbone: Backbone, seed: int) -> Backbone:
    """A backbone of the same shape and tokenizer whose weights are drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(backbone.model.config)
    weights_hash = hash_weights(model)
    model = model.to(device=backbone.device, dtype=backbone.dtype)
    return Backbone(model, backbone.tokenizer, backbone.name, weights_hash)


def pad_tokens(pieces: list[list[int]]) -> torch.Tensor:
    """Right-pad token lists with 0 to int64 [len(pieces), longest].

    Causal attention never looks right, so no mask is needed for what stands left of padding.
    """
    return nn.utils.rnn.pad_sequence([torch.tensor(piece) for piece in pieces], batch_first=True)


def load_backbone(
    config: BackboneConfig,
    device: torch.device | None = None,
    check_weights: Callable[[str], None] | None = None,
) -> Backbone:
    """Load the embedded model, a Hub id or a local folder. No code of its folder is run.

    Args:
        config: Name, revision and dtype.
        device: The device to load it on; None: the CPU.
        check_weights: Called with the hash of a local folder's weights before they are loaded,
            where its files show what `hash_weights` will be. It raises if they are not wanted.

    Raises:
        BackboneError: Not found, not reachable, not a causal language model, without safetensors
            weights, with missing weights, or it needs code of its own.
        AssetError: The embedded model cannot be fetched.
    """
    for name in _KERNEL_CACHES:  # read when the first kernel is made
        os.environ.setdefault(name, str(KERNELS_KEPT))
    with _loading(config) as (source, options, settings):
        _check_stored(config.name, Path(source), settings, check_weights)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, **options, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model, report = loaded
    if report["missing_keys"]:
        raise BackboneError(
            f"backbone {config.name!r} lacks the weights {sorted(report['missing_keys'])[0]}; they "
            "would be random: save the whole model with save_pretrained"
        )
    weights_hash = hash_weights(model)
    device = device or torch.device("cpu")
    dtype = resolve_dtype(config.dtype, device)
    model = model.to(device=device, dtype=dtype)
    return Backbone(model, tokenizer, config.name, weights_hash)


def unloaded_backbone(config: BackboneConfig) -> Backbone:
    """A backbone without numbers and without tokenizer: its layers, their shapes, its dtype.

    Its settings are read, and nothing else of it. Its tensors are on the device ``meta``, and have
    the dtype in which they are stored.

    Raises:
        BackboneError, AssetError: See `load_backbone`.
    """
    with _loading(config) as (_, _, settings):
        return Backbone(_without_numbers(config.name, settings), None, config.name, "")


@contextlib.contextmanager
def _loading(config: BackboneConfig) -> Iterator[tuple[str | Path, dict[str, Any], Any]]:
    """A block that reads a backbone from its source, with options, by its settings."""
    embedded = EMBEDDED.get(config.name)
    source: str | Path = embedded() if embedded else config.name
    options = {"revision": config.revision, "trust_remote_code": False}
    try:
        with LOADING, files.interruptible():
            yield source, options, AutoConfig.from_pretrained(source, **options)
    except PfmError:
        raise
    except Exception as error:  # transformers, tokenizers and the Hub have many of their own
        raise BackboneError(
            f"cannot load backbone {config.name!r}: {reason_of(error)} (embedded: "
            f"{', '.join(EMBEDDED)}; or a Hub id, or a local folder saved with save_pretrained)"
        ) from error


def _without_numbers(name: str, settings: Any) -> Any:
    """The model of some settings, its tensors without numbers."""
    layers = settings.get_text_config().num_hidden_layers
    if not 0 < layers <= _MAX_LAYERS:
        raise BackboneError(f"{name} has {layers} layers; choose a model of up to {_MAX_LAYERS}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def reason_of(error: Exception) -> str:
    """One line on an error of a library."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs Python code of its own folder, which is never run; choose another model"
    return text.splitlines()[0] if text else repr(error)


def _check_stored(
    name: str, folder: Path, settings: Any, check_weights: Callable[[str], None] | None
) -> None:
    """Compare what a local folder stores with its settings, before anything is allocated.

    The model is made without numbers, so that settings which ask for more than the files hold are
    refused. The hash of the files is that of the loaded model if they have its names, shapes and
    dtype. Otherwise it is known after loading only.
    """
    model = _without_numbers(name, settings)
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not paths:
        return
    shapes = {key: list(value.shape) for key, value in model.named_parameters()}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        stored = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118
        num_stored = sum(math.prod(piece.get_shape()) for piece in stored.values())
        if sum(map(math.prod, shapes.values())) > 2 * num_stored:
            raise BackboneError(f"the settings of {name} ask for more weights than it holds")
        is_alike = {key: piece.get_shape() for key, piece in stored.items()} == shapes
        if check_weights is None or not is_alike:
            return
        dtypes = {str(piece[:0].dtype) for piece in stored.values()}
        declared = str(settings.dtype or next(iter(dtypes)))
        if {dtype.removeprefix("torch.") for dtype in dtypes} == {declared.removeprefix("torch.")}:
            check_weights(_hash((key, stored[key][:]) for key in sorted(stored)))


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The torch dtype; ``auto`` is bfloat16 on hardware that multiplies it, else float32."""
    if dtype is not Dtype.AUTO:
        named: torch.dtype = getattr(torch, dtype.value)
        return named
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters, in hex."""
    return _hash(sorted(model.named_parameters()))


def _hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _find_parts(model: Any) -> tuple[str, str, str]:
    """Path of the decoder, and the names of its layer list and of the norm behind it."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for path, module in model.named_modules():
        children = dict(module.named_children())
        names = list(children)
        for name, child in children.items():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                norms = [n for n in names if "norm" in n or n == "ln_f"]
                if len(norms) == 1:
                    return path, name, norms[0]
    raise BackboneError(
        f"{type(model).__name__}: found no list of {count} decoder layers followed by a norm; "
        "choose a decoder-only model such as Llama, Qwen, Gemma or GPT-NeoX"
    )
