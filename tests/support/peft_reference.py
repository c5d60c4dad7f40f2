"""The model once more, the plain way: PEFT, one client and one window at a time, no cache.

It shares no code with `cohort_model` and `head`: both adapters are active on a whole
``AutoModelForCausalLM``, the head is written out as its formula, gradients are autograd's.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pfm_llm.model.lora import PRIVATE, DualAdapter
from pfm_llm.model.private import PrivatePart
from pfm_llm.protocol.types import Tensors, lora_name
from pfm_llm.text.encoding import NO_TARGET, Window
from tests.support.tiny_models import TinyCohort

_FACTOR = {"A": "lora_A", "B": "lora_B"}


def load_private(adapter: DualAdapter, peft: Any, part: PrivatePart, tensors: Tensors) -> None:
    """Put a client's private LoRA, with a shared basis if any, into a `DualAdapter.peft_model`."""
    lora, settings = {}, part.settings
    for name in adapter.modules:
        # PEFT multiplies with the scale itself.
        factors = part.factors(name, tensors, settings.rank / settings.alpha)
        if factors is not None:  # None: the private part does not adapt this layer
            lora[lora_name(name, "A")], lora[lora_name(name, "B")] = factors
    adapter._load(peft, PRIVATE, lora)


class PeftReference:
    """One client's scores, loss and gradients.

    Args:
        cohort: What to refer to; its cohort model and trunk are not used.
        tensors: The client's shared and private tensors.
    """

    def __init__(self, cohort: TinyCohort, tensors: Tensors) -> None:
        self._cohort = cohort
        self._peft: Any = cohort.adapter.peft_model().eval()
        cohort.adapter.load_shared(self._peft, tensors)
        load_private(cohort.adapter, self._peft, cohort.private, tensors)
        self._model = self._peft.get_base_model()
        self._weights = {
            f"{prefix}.{module}.{factor}": self._model.get_submodule(
                f"{module}.{_FACTOR[factor]}.{adapter}"
            ).weight.requires_grad_()
            for prefix, adapter in (("lora", "shared"), ("private.lora", "private"))
            for module in cohort.adapter.modules
            for factor in "AB"
        }
        self.head = {
            name: value.detach().clone().requires_grad_()
            for name, value in tensors.items()
            if ".head." in f".{name}"
        }

    def scores(self, window: Window) -> torch.Tensor:
        """Scores [L, I] at every item of a window."""
        head, ends = self.head, torch.from_numpy(window.item_ends).long()
        decoder = self._model.get_decoder()
        lowest = decoder.layers[self._cohort.backbone.num_layers - self._cohort.adapters.num_layers]

        def add_item_inputs(_layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            for end, item in zip(window.item_ends.tolist(), window.items.tolist(), strict=True):
                added = head["head.item_ids_in"] @ head["head.item_ids"][item]
                hidden[0, end] = hidden[0, end] + added.to(hidden.dtype)
            return (hidden, *args[1:])

        hooked = "head.item_ids_in" in head
        handle = lowest.register_forward_pre_hook(add_item_inputs) if hooked else None
        tokens = torch.from_numpy(window.tokens).long()[None]
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
        if handle is not None:
            handle.remove()
        normaliser, texts = self._cohort.normaliser, self._cohort.item_texts
        white = (hidden[ends].float() - normaliser.mean) @ normaliser.basis
        items = window.items.tolist()
        return torch.stack([self._score_row(n, texts, items[: t + 1]) for t, n in enumerate(white)])

    def _context(self, texts: torch.Tensor, items: list[int]) -> torch.Tensor:
        """For each half-life h the mean of [z; e], weighted by 2^(-age / h), times r / (r + n)."""
        head, summed = self.head, []
        for h in head["head.context_log_h"].exp():
            weights = [2 ** (-age / h) for age in reversed(range(len(items)))]
            read = [
                torch.cat([texts[item], head["head.item_ids"][item]])
                if "head.item_ids" in head
                else texts[item]
                for item in items
            ]
            total = torch.stack([w * x for w, x in zip(weights, read, strict=True)]).sum(0)
            summed.append(total / torch.stack(weights).sum())
        r, priors = len(items), head["head.context_log_n"].exp()
        trusted = [mean * r / (r + n) for n, mean in zip(priors, summed, strict=True)]
        return head["head.context_proj"] @ torch.cat(trusted)

    def _score_row(self, n: torch.Tensor, texts: torch.Tensor, items: list[int]) -> torch.Tensor:
        """score_i = 0.5/sqrt(D) (u . P z_i + u . O e_i) + b_i, u = r/(r + n) (W + B A) n + C c."""
        head = self.head
        u = head["head.state_proj"] @ n
        if "private.head.B" in head:
            a = head.get("private.head.A", head.get("basis.head.A"))
            u = u + head["private.head.B"] @ (a @ n)
        u = u * len(items) / (len(items) + head["head.state_log_n"].exp())
        if "head.context_proj" in head:
            u = u + self._context(texts, items)
        scores = []
        for item, z in enumerate(texts):
            score = u @ (head["head.item_proj"] @ z)
            if "head.item_ids" in head:
                score = score + u @ (head["head.item_ids_out"] @ head["head.item_ids"][item])
            score = score * 0.5 / len(z) ** 0.5
            if "head.item_bias" in head:
                score = score + head["head.item_bias"][item]
            scores.append(score)
        return torch.stack(scores)

    def loss_and_gradients(
        self, windows: Sequence[Window]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean negative log-likelihood over all targets, and its gradients by tensor name."""
        terms = []
        for window in windows:
            scores = self.scores(window)
            for row, target in zip(scores, window.targets.tolist(), strict=True):
                if target != NO_TARGET:
                    terms.append(row.logsumexp(0) - row[target])
        loss = torch.stack(terms).mean()
        if "head.item_met" in self.head:  # no part of the loss, but its gradient says what was met
            own = sorted({int(item) for window in windows for item in window.met})
            met = self.head["head.item_met"][own]
            loss = loss - 1e-3 * (met - met.detach()).sum()
        leaves = {**self._weights, **self.head}
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return loss.detach(), dict(zip(leaves, gradients, strict=True))
