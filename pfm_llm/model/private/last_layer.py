"""The last layer at the tokens that are read out, without its attention.

A private part that acts behind the attention of the last layer changes nothing before it. What the
attention gives at a token, and what the layer gets there, therefore follow from the history and the
shared state alone. Kept, they spare the next pass over the same history all but one token of one
layer, whatever the private part is by then.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BEHIND_ATTENTION = ("o_proj", "dense", "out_proj")
"""Names of the linear layer behind the attention in Llama and its kin, GPT-NeoX and others."""


@dataclass
class LastTokens:
    """What the last layer starts from behind its attention, at K tokens that are read out.

    Attributes:
        hidden: [K, d], the input of the layer; None: they are not filled yet.
        attended: [K, a], the input of the linear layer behind the attention.
        contexts: Of each token the context term of its user vector, [1, D], or None.
    """

    hidden: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    contexts: Sequence[torch.Tensor | None] = ()

    @classmethod
    def joined(cls, each: "Sequence[LastTokens]") -> "LastTokens":
        """The tokens of all, in their order; not filled unless all are."""
        hidden = [one.hidden for one in each if one.hidden is not None]
        attended = [one.attended for one in each if one.attended is not None]
        if len(hidden) < len(each):
            return cls()
        contexts = [context for one in each for context in one.contexts]
        return cls(torch.cat(hidden), torch.cat(attended), contexts)

    def fill(self, each: "Sequence[LastTokens]") -> None:
        """Give each of K its own token."""
        if self.hidden is not None and self.attended is not None:
            for number, one in enumerate(each):
                row = slice(number, number + 1)
                one.hidden, one.attended = self.hidden[row].clone(), self.attended[row].clone()
                one.contexts = self.contexts[row]


class LastLayer:
    """Takes `LastTokens` out of a pass, and goes on from them.

    Args:
        top: A decoder with one list of layers and a norm behind them.
        behind: Path in it of the linear layer behind the attention of its last layer. The module
            that holds it gives a pair, of which the first is what that linear layer gives.
    """

    def __init__(self, top: Any, behind: str) -> None:
        layers, _, attention, *_ = behind.split(".")
        self._last = getattr(top, layers)[-1]
        self._linear = top.get_submodule(behind)
        self._stub = _Attended(self._linear)
        layer = copy.copy(self._last)
        layer._modules = {**layer._modules, attention: self._stub}
        self._view = copy.copy(top)
        self._view._modules = {**top._modules, layers: nn.ModuleList([layer])}
        self._view.config = copy.deepcopy(top.config)
        self._view.config.num_hidden_layers = 1
        if getattr(top.config, "layer_types", None) is not None:
            self._view.config.layer_types = list(top.config.layer_types)[-1:]

    @contextlib.contextmanager
    def keeping(
        self, tokens: LastTokens, where: tuple[torch.Tensor, torch.Tensor]
    ) -> Iterator[None]:
        """A block in which the top runs; it fills the tokens.

        Args:
            tokens: To be filled.
            where: Row and token of each, int64 [K] both.
        """

        def of_layer(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = args[0] if args else options["hidden_states"]
            tokens.hidden = hidden[where]

        def of_linear(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens.attended = args[0][where]

        hooks = (
            self._last.register_forward_pre_hook(of_layer, with_kwargs=True),
            self._linear.register_forward_pre_hook(of_linear),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def states(self, tokens: LastTokens) -> torch.Tensor:
        """The normalised states [K, d] at the tokens, each in a row of its own."""
        assert tokens.hidden is not None
        self._stub.attended = tokens.attended
        found: torch.Tensor = self._view(inputs_embeds=tokens.hidden[:, None], use_cache=False)[0]
        return found[:, 0]


class _Attended(nn.Module):
    """Stands for an attention whose result before its last linear layer is known."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.attended: torch.Tensor | None = None

    def forward(self, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        """What the linear layer gives."""
        assert self.attended is not None
        return self.linear(self.attended[:, None]), None
