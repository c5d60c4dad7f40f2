"""The reference that the many-clients pass is raced against: PEFT, one client at a time.

Written as somebody who knows PEFT would write it: both adapters active on one model, a client's
weights copied into them, one unpadded forward pass over its window, the decoder alone (no
vocabulary logits), no key-value cache, eval mode, gradients of exactly what is trained and no
optimizer. Adapter weights have the backbone's dtype, so that no activation is cast to float32
and back, as PEFT's default would do under bfloat16. The head is the library's own; the objective
is written out anew, which items are candidates included, so that the check before the race
compares two computations of it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from pfm_llm.base import seeding
from pfm_llm.model import head as recommender_head
from pfm_llm.model.backbone import Backbone
from pfm_llm.model.items.whitening import Normaliser
from pfm_llm.model.lora import PRIVATE, SHARED, DualAdapter
from pfm_llm.protocol.types import PRIVATE_PREFIX, Tensors
from pfm_llm.text.encoding import NO_TARGET, Window

_NOISE = 0.02
_PREFIXES = {SHARED: "lora.", PRIVATE: f"{PRIVATE_PREFIX}lora."}

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A client's loss, and its gradients by name."""


class SequentialPeft:
    """Loss and gradients of one client after another, from tokens, without any cache.

    Private adapters are of kind ``independent``.

    Args:
        backbone: The frozen model; it is not changed.
        adapter: Which of its layers are adapted, and how.
        normaliser: The catalogue's whitening.
        item_texts: float32 [I, D], whitened text embeddings.
        unseen_only: Whether the items that the user has met are no candidates.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: DualAdapter,
        normaliser: Normaliser,
        item_texts: torch.Tensor,
        unseen_only: bool,
    ) -> None:
        self._unseen_only = unseen_only
        self._device = backbone.device
        self._normaliser = normaliser.to(self._device)
        self._item_texts = item_texts.to(self._device)
        model = adapter.peft_model().eval().get_base_model()
        decoder_path, _, layers_name = backbone.layers_path.rpartition(".")
        self._decoder: Any = model.get_submodule(decoder_path)
        first = min(layer_index(name, backbone.layers_path) for name in adapter.modules)
        self._decoder.get_submodule(f"{layers_name}.{first}").register_forward_pre_hook(
            self._add_item_inputs
        )
        self._lora = {
            f"{prefix}{name}.{factor}": model.get_submodule(f"{name}.lora_{factor}.{which}").weight
            for name in adapter.modules
            for which, prefix in _PREFIXES.items()
            for factor in ("A", "B")
        }
        for weight in self._lora.values():
            weight.data = weight.data.to(backbone.dtype)
            weight.requires_grad_()
        self._item_inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def client_step(self, window: Window, tensors: Tensors) -> Step:
        """Mean cross-entropy over the candidates, and its gradients.

        Args:
            window: The client's window.
            tensors: Its shared and private tensors, float32, named as in `pfm_llm.protocol.types`.

        Returns:
            The loss (nats, scalar) and a float32 gradient for each of ``tensors``.
        """
        self._load(tensors)
        head = {
            name: value.to(self._device).requires_grad_()
            for name, value in ((n, v.detach()) for n, v in tensors.items())
            if name not in self._lora
        }
        loss = self._loss(window, head)
        leaves = {**self._lora, **head}
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found = {name: g.float() for name, g in zip(leaves, gradients, strict=True)}
        return loss.detach(), found

    @torch.no_grad()
    def _load(self, tensors: Tensors) -> None:
        for name, weight in self._lora.items():
            weight.copy_(tensors[name])

    def _loss(self, window: Window, head: Tensors) -> torch.Tensor:
        ends, items, targets = (
            torch.tensor(array, dtype=torch.int64, device=self._device)
            for array in (window.item_ends, window.items, window.targets)
        )
        met, own = recommender_head.met_items(head), torch.tensor(window.met).long().unique()
        told = recommender_head.met_term(head, own.to(self._device)) if met is not None else 0.0
        head = recommender_head.with_met_rows({**head})
        inputs = recommender_head.item_inputs(head, items)
        self._item_inputs = None if inputs is None else (ends, inputs)
        tokens = torch.tensor(window.tokens, dtype=torch.int64, device=self._device)
        states = self._decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        trained = targets != NO_TARGET
        context = recommender_head.context_vectors(head, items[None], self._item_texts)
        vectors = recommender_head.user_vectors(
            head,
            self._normaliser(states[ends[trained]]),
            1 + trained.nonzero()[:, 0],
            _private_head(head),
            None if context is None else context[0, trained],
        )
        scores = recommender_head.score_items(head, vectors, self._item_texts)
        if self._unseen_only:
            seen = _seen(window, len(self._item_texts)).to(self._device)[trained]
            scores = scores.masked_fill(seen, -torch.inf)
        if met is not None:
            met = met.index_fill(0, own.to(self._device), True)
            scores = scores.masked_fill(~met, -torch.inf)
        return F.cross_entropy(scores, targets[trained]) + told

    def _add_item_inputs(self, _layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the lowest adapted layer: add each item's ID input at its last token."""
        if self._item_inputs is None:
            return None
        ends, inputs = self._item_inputs
        hidden = arguments[0]
        return (hidden.index_add(1, ends, inputs.to(hidden.dtype)[None]), *arguments[1:])


def stirred(tensors: Tensors, seed: int, purpose: str) -> dict[str, torch.Tensor]:
    """Tensors plus a little noise, as if trained: what starts at zero is zero no longer."""
    generator = seeding.generator(seed, f"benchmark/{purpose}")
    return {
        name: value + _NOISE * torch.randn(value.shape, generator=generator)
        for name, value in tensors.items()
    }


def relative_difference(found: Tensors, expected: Tensors) -> float:
    """Euclidean norm of the difference of all tensors together, over that of ``expected``."""
    wrong = sum(float((found[n] - value).double().square().sum()) for n, value in expected.items())
    whole = sum(float(value.double().square().sum()) for value in expected.values())
    return math.sqrt(wrong / whole)


def _seen(window: Window, num_items: int) -> torch.Tensor:
    """What the user had met by each position, bool [L, num_items], without the next item."""
    before, items, targets = (
        torch.tensor(array, dtype=torch.int64)
        for array in (window.history.items[: window.start], window.items, window.targets)
    )
    seen = F.one_hot(items, num_items).cumsum(0).bool()
    seen[:, before] = True
    trained = (targets != NO_TARGET).nonzero()[:, 0]
    seen[trained, targets[trained]] = False
    return seen


def layer_index(module: str, layers_path: str) -> int:
    """The number of the layer that a module is in, from its path in the model."""
    return int(module.removeprefix(f"{layers_path}.").partition(".")[0])


def _private_head(head: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
    if "private.head.B" not in head:
        return None
    return head["private.head.A"], head["private.head.B"]
