"""The reference that stacked serving is raced against: PEFT's mixed batch.

Written as somebody who knows PEFT would write it: the shared adapter is merged into the weights,
each user's private LoRA is an adapter with a name, loaded once, and one pass serves a batch whose
rows name their adapters (``adapter_names``). Adapter weights have the backbone's dtype, and the
decoder runs without a key-value cache and without its head over the vocabulary. Inputs, whitening
and the recommender head are the library's own, so that what differs is how the adapted layers run.
"""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.sequential_peft import layer_index
from pfm_llm.model.build import ModelParts
from pfm_llm.model.layers import Readout, ReadoutMlp, read_last_mlp_only
from pfm_llm.protocol.types import Tensors
from pfm_llm.recommender.serving import StackedServing
from pfm_llm.runs.run import Trained

_SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A PEFT model with an adapter for each user, and what it took to load them.

    Attributes:
        model: The model.
        names: The names of the users' adapters.
        last_mlp: The MLP of its last layer.
        seconds_per_user: To load one adapter from its folder.
    """

    model: Any
    names: tuple[str, ...]
    last_mlp: ReadoutMlp
    seconds_per_user: float


def loaded(
    parts: ModelParts, trained: Trained, private: Sequence[Tensors], merges_shared: bool
) -> Loaded:
    """The backbone in PEFT with the private LoRA of each user, by way of exported folders.

    Args:
        parts: The model; it is not changed.
        trained: Its shared state, and the weight of private parts.
        private: The private tensors of each user.
        merges_shared: Whether the shared adapter is merged into the weights. If not, each user's
            adapter is the shared and the private one joined by PEFT, of the sum of their ranks.
    """
    shared, names = trained.shared.tensors, tuple(f"user{n}" for n in range(len(private)))
    as_stored: dict[str, Any] = {"autocast_adapter_dtype": False}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        parts.adapter.export_shared(shared, at / _SHARED, parts.backbone.portable_name)
        for name, own in zip(names, private, strict=True):
            parts.export_private({**shared, **own}, trained.private_weight, at / name)
        base = copy.deepcopy(parts.backbone.model)
        model: Any = PeftModel.from_pretrained(base, str(at / _SHARED), _SHARED, **as_stored)
        if merges_shared:
            merged, first = model.merge_and_unload(), names[0]
            model = PeftModel.from_pretrained(merged, str(at / first), first, **as_stored)
        started = time.perf_counter()
        late = names[1:] if merges_shared else names
        for name in late:
            model.load_adapter(str(at / name), name, **as_stored)
        seconds = (time.perf_counter() - started) / max(1, len(late))
    if not merges_shared:
        names = tuple(_joined(model, name) for name in names)
    last_mlp = _keep_adapted_layers(parts, model.get_base_model())
    return Loaded(model.eval(), names, last_mlp, seconds)


def _keep_adapted_layers(parts: ModelParts, model: Any) -> ReadoutMlp:
    """Drop the layers below the adapted ones, whose states are given; the MLP of the last one."""
    path, _, name = parts.backbone.layers_path.rpartition(".")
    decoder = model.get_submodule(path)
    below = min(layer_index(module, parts.backbone.layers_path) for module in parts.adapter.modules)
    setattr(decoder, name, getattr(decoder, name)[below:])
    decoder.config.num_hidden_layers -= below
    last_mlp = read_last_mlp_only(decoder)
    assert last_mlp is not None
    return last_mlp


def _joined(model: Any, name: str) -> str:
    """Join a user's adapter with the shared one; the name of what becomes of them."""
    both = f"{_SHARED}_{name}"
    model.add_weighted_adapter([_SHARED, name], [1.0, 1.0], both, combination_type="cat")
    model.delete_adapter(name)
    return both


class MixedBatch:
    """The adapted layers of a pass in PEFT; it takes the place of `layers.CohortLayers`.

    Args:
        parts: The model whose layers they are.
        of: Row n of each pass is served with adapter ``names[n]``.
        reads_last_mlp_only: Whether the MLP of the last layer skips tokens that nothing reads, as
            ours does. PEFT by itself does not.
    """

    def __init__(self, parts: ModelParts, of: Loaded, reads_last_mlp_only: bool) -> None:
        self._tuner, self._names = of.model.base_model, list(of.names)
        path = parts.backbone.layers_path.rpartition(".")[0]
        self._decoder: Any = of.model.get_base_model().get_submodule(path)
        self._last_mlp, self._reads_last_mlp_only = of.last_mlp, reads_last_mlp_only
        self.tokens, self.goes_on = None, False  # PEFT keeps nothing of a pass

    def set_factors(self, *_: object, **__: object) -> None:
        """Nothing: the factors are those of the loaded adapters."""

    def states(
        self,
        hidden: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor],
        sight: Mapping[str, torch.Tensor],
        *_: object,
    ) -> torch.Tensor:
        """See `layers.CohortLayers.states`."""
        here = Readout.of(*where, len(hidden)) if self._reads_last_mlp_only else None
        self._last_mlp.readout = here
        # What `PeftModel.forward` does, without the head over the vocabulary behind it.
        with self._tuner._enable_peft_forward_hooks(adapter_names=self._names):
            found = self._decoder(inputs_embeds=hidden, use_cache=False, **sight)[0]
        states: torch.Tensor = found[where]
        return states


def serving_with(parts: ModelParts, trained: Trained, layers: MixedBatch) -> StackedServing:
    """The same serving with other layers: inputs, head and the scores of the private part stay."""
    model = copy.copy(parts.model)
    model.layers = layers  # type: ignore[assignment]
    return StackedServing(dataclasses.replace(parts, model=model), trained)
