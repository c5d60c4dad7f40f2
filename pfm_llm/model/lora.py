"""Shared and private LoRA on one backbone, in PEFT's format: creation, export, names.

This is the only module that imports ``peft``. Both adapters are plain LoRA on
``AutoModelForCausalLM``, made from `peft.LoraConfig`. They are trained in the many-clients pass
(`cohort`, `layers`), and exported as an ordinary PEFT folder.
"""

import contextlib
import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from pfm_llm.base import files
from pfm_llm.base.errors import BackboneError, ConfigError, CorruptFileError
from pfm_llm.config.model import AdaptersConfig, LoraAdapterConfig, SharedAdapterConfig
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.private.part import Factors, OutputLora
from pfm_llm.protocol.types import Group, Tensors, lora_name, of_group

SHARED = "shared"
PRIVATE = "private"
ALL_LINEAR = "all-linear"
EXPORTED_SETTINGS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "bias",
    "fan_in_fan_out",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
"""What ``adapter_config.json`` holds. PEFT refuses a setting that it does not know, so a file with
every default of a new PEFT cannot be read by an older one. PEFT 0.13 knows all of these."""
OUTPUT_FILE = "output_lora.safetensors"
"""In the folder of a private LoRA, the one on the layer that gives scores."""
_PRIVATE_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", OUTPUT_FILE}
_Value = TypeVar("_Value")
_PEFT_PREFIX = "base_model.model."
_PEFT_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class DualAdapter:
    """The adapted modules of a backbone, and everything that has PEFT's format.

    Args:
        backbone: The frozen model; it is not changed.
        config: Ranks, targets and the number of adapted layers.

    Attributes:
        modules: Path in the model to (in_features, out_features) of each adapted layer.

    Raises:
        BackboneError: The model has fewer layers, or a target module is missing or not linear.
    """

    def __init__(self, backbone: Backbone, config: AdaptersConfig) -> None:
        self._backbone = backbone
        self._config = config
        first = backbone.first_top_layer(config.num_layers)
        self._layers = list(range(first, backbone.num_layers))
        self.modules = self._find_modules()

    def top_paths(self) -> dict[str, str]:
        """Path in the model to path in the backbone's top view of each adapted layer."""
        first, prefix = self._layers[0], f"{self._backbone.layers_path}."
        layers_name = self._backbone.layers_path.rpartition(".")[2]
        paths = {}
        for name in self.modules:
            index, _, rest = name.removeprefix(prefix).partition(".")
            paths[name] = f"{layers_name}.{int(index) - first}.{rest}"
        return paths

    def scale(self) -> float:
        """The factor of the shared adapter's product B A; see `SharedAdapterConfig.scale`."""
        return self._config.shared.scale

    def peft_model(self) -> Any:
        """A fresh `peft.PeftModel` with both adapters, on modules of its own.

        The base weights are shared with the backbone; adapter weights are float32. `load_shared`
        loads the shared adapter; the private one is as PEFT draws it.
        """
        model = _clone_structure(self._backbone.model)
        peft_model: Any = get_peft_model(model, self._lora_config(self._config.shared), SHARED)
        peft_model.add_adapter(PRIVATE, self._lora_config(self._config.private))
        peft_model.base_model.set_adapter([SHARED, PRIVATE])
        return peft_model

    def load_shared(self, peft_model: Any, shared: Tensors) -> None:
        """Put the shared LoRA into a model from `peft_model`."""
        self._load(peft_model, SHARED, of_group(shared, Group.LORA))

    def export_shared(self, shared: Tensors, folder: Path, base_name: str) -> None:
        """Write the shared adapter as a PEFT folder, and nothing else.

        Args:
            shared: The shared state's tensors; only ``lora.`` ones are used.
            folder: The folder to write; created as needed.
            base_name: Portable name of the base model for ``adapter_config.json``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = of_group(shared, Group.LORA)
        self._export(self._lora_config(self._config.shared), tensors, folder, base_name)

    def export_private(
        self,
        lora: Mapping[str, Factors],
        folder: Path,
        base_name: str,
        output: OutputLora | None = None,
    ) -> None:
        """Write a user's private LoRA as a PEFT folder that its owner alone can read.

        PEFT loads it beside the shared adapter. With both active, or joined by
        ``add_weighted_adapter`` with weights of 1 and ``combination_type="cat"``, the layers give
        the states that the user is served with.

        Args:
            lora: By adapted module its factors A [r, in] and B [out, r], B times its scale.
            folder: The folder to write; created as needed, and made 0700.
            base_name: As in `export_shared`.
            output: A LoRA on the layer that turns user vectors into scores, written beside it
                under PEFT's names of the three tensors (``lora_bias``). The layer is no part of the
                base model.

        Raises:
            ConfigError: There is no LoRA, since the private part acts on the head alone; or it is
                zero; or the folder holds other files than an adapter's.
        """
        files.check_own_dir(folder, _PRIVATE_FILES)
        ranks = {len(a) for a, _ in lora.values()}
        if len(ranks) != 1:
            raise ConfigError(
                "this private part has no LoRA on the layers of the language model; train with "
                "method: pfm, or another kind of adapters.private that acts on layers"
            )
        if not any(bool(b.any()) for _, b in lora.values()):
            raise ConfigError(
                "this private LoRA is zero: its history is empty, or validation gave private parts "
                "a weight of 0; there is nothing to export"
            )
        (rank,) = ranks
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=sorted(lora)
        )
        tensors = {
            lora_name(module, factor): value
            for module, factors in lora.items()
            for factor, value in zip("AB", factors, strict=True)
        }
        self._export(config, tensors, files.make_private_dir(folder), base_name)
        if output is not None:
            named = zip(("lora_A.weight", "lora_B.weight", "lora_B.bias"), output, strict=True)
            given = {name: value for name, value in named if value is not None}
            files.write_tensors(folder / OUTPUT_FILE, given)

    def _export(self, config: LoraConfig, tensors: Tensors, folder: Path, base_name: str) -> None:
        """Write one adapter, made in a model in which no other exists, as PEFT writes it."""
        peft_model = get_peft_model(_clone_structure(self._backbone.model), config, SHARED)
        self._load(peft_model, SHARED, tensors)
        peft_model.peft_config[SHARED].base_model_name_or_path = base_name
        scratch = folder / ".peft"  # PEFT writes an adapter x to <dir>/x
        with files.storage_errors(folder), contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
            peft_model.save_pretrained(
                str(scratch), selected_adapters=[SHARED], save_embedding_layers=False
            )
            path = scratch / SHARED / "adapter_config.json"
            tree = files.read_json(path)
            # PEFT keeps the targets as a set. Sorted, equal adapters give equal files.
            tree["target_modules"] = sorted(tree["target_modules"])
            files.write_json(path, {key: tree[key] for key in EXPORTED_SETTINGS})
            for file in sorted((scratch / SHARED).iterdir()):
                file.replace(folder / file.name)

    def _load(self, peft_model: Any, adapter: str, tensors: Tensors) -> None:
        state = {name: value.clone() for name, value in names_to_peft(tensors).items()}
        result: Any = set_peft_model_state_dict(peft_model, state, adapter_name=adapter)
        if result.unexpected_keys:
            raise BackboneError(f"PEFT did not take {result.unexpected_keys[0]}")

    def _lora_config(self, adapter: LoraAdapterConfig) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            use_rslora=isinstance(adapter, SharedAdapterConfig) and adapter.use_rslora,
            lora_dropout=adapter.dropout,
            target_modules=self._target_names(),
            layers_to_transform=self._layers,
            layers_pattern=self._backbone.layers_path.rpartition(".")[2],
        )

    def _target_names(self) -> list[str]:
        targets = self._config.targets
        if targets == ALL_LINEAR:
            # PEFT's own "all-linear" cannot be combined with layers_to_transform.
            return self._linear_names()
        return [targets] if isinstance(targets, str) else list(targets)

    def _linear_names(self) -> list[str]:
        layers = self._backbone.model.get_submodule(self._backbone.layers_path)
        modules = layers.named_modules()
        return sorted({n.rpartition(".")[2] for n, m in modules if isinstance(m, nn.Linear)})

    def _find_modules(self) -> dict[str, tuple[int, int]]:
        model = _clone_structure(self._backbone.model)
        try:
            peft_model: Any = get_peft_model(model, self._lora_config(self._config.shared), SHARED)
        except ValueError as error:
            raise self._missing(self._target_names()) from error
        names = peft_model.base_model.targeted_module_names
        # PEFT raises only when none of the names matches; here each name must match.
        missing = [
            t for t in self._target_names() if not any(f".{n}".endswith(f".{t}") for n in names)
        ]
        if missing:
            raise self._missing(missing)
        modules = {}
        for name in names:
            module = self._backbone.model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise BackboneError(
                    f"{name} is a {type(module).__name__}; only linear layers can be adapted: "
                    "change adapters.targets"
                )
            modules[name] = (module.in_features, module.out_features)
        return modules

    def _missing(self, targets: list[str]) -> BackboneError:
        return BackboneError(
            f"{self._backbone.name} has no modules {', '.join(map(repr, targets))} to adapt in its "
            f"top {self._config.num_layers} layers; name some of its linear layers in "
            f"adapters.targets: {', '.join(self._linear_names()) or '(it has none)'}"
        )


def settings_from_peft(config: LoraConfig) -> dict[str, Any]:
    """The settings ``adapters`` that a `peft.LoraConfig` stands for.

    Taken are ``r``, ``lora_alpha``, ``lora_dropout``, ``use_rslora`` and, if given,
    ``target_modules``. ``adapters.num_layers`` says which layers are adapted.

    Raises:
        ConfigError: Another setting than these has not its default.
    """
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        task_type=config.task_type if config.task_type == "CAUSAL_LM" else None,
        inference_mode=config.inference_mode,
    ).to_dict()
    given = config.to_dict()
    if other := sorted(key for key, value in given.items() if value != plain.get(key)):
        raise ConfigError(
            f"adapters.shared: the LoraConfig sets {', '.join(other)}, which cannot be trained "
            "here; of a LoraConfig r, lora_alpha, lora_dropout, use_rslora and target_modules are "
            "taken, and adapters.num_layers says which layers are adapted"
        )
    shared = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    targets = config.target_modules
    named = targets if targets is None or isinstance(targets, str) else sorted(targets)
    return {
        "shared": {**shared, "use_rslora": config.use_rslora},
        **({} if named is None else {"targets": named}),
    }


def names_to_peft(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Factors of a LoRA, by our names, under their names in ``adapter_model.safetensors``."""
    return {
        f"{_PEFT_PREFIX}{name.removeprefix('lora.')[:-2]}.lora_{name[-1]}.weight": value
        for name, value in tensors.items()
    }


def names_from_peft(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """The content of a PEFT file under our names; the inverse of `names_to_peft`.

    Args:
        state: Tensors, or what is known of them, by their names in ``adapter_model.safetensors``.

    Raises:
        CorruptFileError: A name is not that of a factor of a LoRA.
    """
    renamed = {}
    for key, value in state.items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None:
            raise CorruptFileError(f"{key} is no factor of a LoRA: not a folder of ours")
        renamed[lora_name(match["module"], match["factor"])] = value
    return renamed


def _clone_structure(model: Any) -> Any:
    """New modules around the same tensors, so that PEFT can replace layers in the copy."""
    shared: Mapping[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, dict(shared))
