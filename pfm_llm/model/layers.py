"""The adapted layers of the many-clients pass: each row of a batch with its own client's LoRA.

`CohortLinear` takes the place of each adapted linear layer in the top view of the backbone. The
adapters have PEFT's format in `lora`.

The MLP of the last layer runs only on the tokens whose state is read out (`ReadoutMlp`). Nothing
uses the last layer's output elsewhere, and an MLP maps each token independently. Where the layers
read tokens, about four fifths of them can be skipped without changing any score. With few adapted
layers this saves a good part of all work.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pfm_llm.base.errors import BackboneError
from pfm_llm.model.batches import Dropout
from pfm_llm.model.private.last_layer import BEHIND_ATTENTION, LastLayer, LastTokens
from pfm_llm.model.private.part import Factors, PrivatePart
from pfm_llm.protocol.types import Tensors, lora_name


@dataclass(frozen=True)
class LoraInput:
    """The product with A of both adapters, with dropout on its input."""

    dropout: Dropout
    batch: "AdaptedRows"
    ranks: list[int]
    rates: list[float]

    def __call__(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, in] and A^T [N, in, sum of ranks] to [N, T, sum of ranks]."""
        parts = zip(a.split(self.ranks, 2), self.rates, strict=True)
        return torch.cat([torch.bmm(self._dropped(x, rate), part) for part, rate in parts], 2)

    def _dropped(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        if not rate:
            return x
        factors = torch.zeros(x.shape)
        rows = zip(self.batch.row_clients.tolist(), self.batch.row_lengths.tolist(), strict=True)
        for row, (client, length) in enumerate(rows):
            factors[row, :length] = self.dropout.keep((length, x.shape[2]), rate, client)
        return x * factors.to(x)


class CohortLinear(nn.Module):
    """A frozen linear layer plus a low-rank term that differs from row to row of the batch."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self.lora_input: LoraInput | None = None
        self.by_token: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, in] to [N, T, out].

        ``factors`` are A^T [N, in, r] and B^T [N, r, out]. ``by_token`` are such factors of one
        more LoRA, and its coefficients [N, T, r], which scale the product with A at each token.
        """
        output: torch.Tensor = self.base(x)
        if self.by_token is not None:
            a, b, coefficients = self.by_token
            output = torch.baddbmm(output, torch.bmm(x, a) * coefficients, b)
        if self.factors is None:
            return output
        a, b = self.factors
        low = torch.bmm(x, a) if self.lora_input is None else self.lora_input(x, a)
        return torch.baddbmm(output, low, b)


@dataclass(frozen=True)
class Readout:
    """Token positions that are read out, padded to a rectangle.

    Attributes:
        index: int64 [N, L], token index in each row; 0 where there is none.
        valid: bool [N, L], False on padding.
    """

    index: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, ends: torch.Tensor, num_rows: int) -> "Readout":
        """From the row and the token of each output.

        Args:
            rows: int64 [K], ascending.
            ends: int64 [K].
            num_rows: N.
        """
        counts = rows.bincount(minlength=num_rows)
        valid = torch.arange(int(counts.max()), device=rows.device) < counts[:, None]
        return cls(torch.zeros_like(valid, dtype=ends.dtype).masked_scatter(valid, ends), valid)


class ReadoutMlp(nn.Module):
    """A layer's MLP that skips the tokens whose output is not read out.

    Args:
        mlp: Maps [N, T, d] to [N, T, d], each token by itself.

    Attributes:
        readout: Where outputs are needed; elsewhere they are zero. None: everywhere.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.readout: Readout | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, T, d] to [N, T, d]."""
        if self.readout is None:
            output: torch.Tensor = self.mlp(x)
            return output
        where = self.readout.index[..., None].expand(-1, -1, x.shape[2])
        # Padding points at token 0, which may be read out too: it must add nothing there.
        read = self.mlp(x.gather(1, where)) * self.readout.valid[..., None]
        return torch.zeros_like(x).scatter_add(1, where, read)


def layers_of(top: nn.Module) -> nn.ModuleList:
    """The list of layers of a decoder; empty where it has none."""
    lists = (child for child in top.children() if isinstance(child, nn.ModuleList))
    return next(lists, nn.ModuleList())


def read_last_mlp_only(top: nn.Module) -> ReadoutMlp | None:
    """Replace the MLP of the top's last layer; None when the architecture has none by that name.

    Args:
        top: A decoder with one list of layers.
    """
    last = next(reversed(layers_of(top)), None)
    mlp = getattr(last, "mlp", None)
    if last is None or not isinstance(mlp, nn.Module):
        return None
    wrapped = ReadoutMlp(mlp)
    last.mlp = wrapped
    return wrapped


class SecondRun:
    """The last layer of a top view and the norm behind it, run again on the same input.

    Args:
        top: A decoder with one list of layers and a norm, as `Backbone.split` makes it.

    Attributes:
        keeps: Whether the next run of the top keeps the input of its last layer.
    """

    def __init__(self, top: nn.Module) -> None:
        children = top.named_children()
        self._layer = layers_of(top)[-1]
        self._norm = next(m for name, m in children if "norm" in name or name == "ln_f")
        self._kept: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.keeps = False
        self._layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def __call__(self) -> torch.Tensor:
        """The states [N, T, d] behind the norm; no gradient reaches the layers below."""
        assert self._kept is not None
        args, options = self._kept
        found = self._layer(*args, **options)
        states: torch.Tensor = self._norm(found[0] if isinstance(found, tuple) else found)
        return states

    def _keep(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.keeps:
            self.keeps = False
            fixed = {name: _fixed(value) for name, value in options.items()}
            self._kept = tuple(map(_fixed, args)), fixed


def _fixed(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


class AdaptedRows(Protocol):
    """The rows of a batch, each of one client."""

    @property
    def row_clients(self) -> torch.Tensor:
        """Index of each row's client in the chunk, int64 [N]."""
        ...

    @property
    def row_lengths(self) -> torch.Tensor:
        """Tokens of each row without padding, int64 [N]."""
        ...


class CohortLayers:
    """The layers of a top view, of which the adapted ones get the LoRA factors of each row.

    Args:
        top: The top view of the backbone; its adapted linear layers are replaced.
        modules: Path in the full model to path in ``top`` of each adapted layer.
        scale: The factor of the shared adapter's product B A.

    Attributes:
        tokens: What `states` fills, one token a row, or goes on from where it is filled; see
            `keeps_tokens`. None: neither.
    """

    def __init__(self, top: Any, modules: Mapping[str, str], scale: float) -> None:
        self._top, self._scale = top, scale
        self._linears: dict[str, CohortLinear] = {}
        for name, path in modules.items():
            linear = CohortLinear(top.get_submodule(path))
            top.set_submodule(path, linear)
            self._linears[name] = linear
        self._paths = dict(modules)
        self._last_mlp = read_last_mlp_only(top)
        self._last_layer: LastLayer | None = None
        self.tokens: LastTokens | None = None

    @functools.cached_property
    def _again(self) -> SecondRun:
        return SecondRun(self._top)

    def check_last(self, modules: Iterable[str]) -> None:
        """Check that some adapted modules are of the last layer, as `states_by_token` needs it.

        Raises:
            BackboneError: A module is not.
        """
        for module in modules:
            if not self._is_last(module):
                raise BackboneError(
                    f"a LoRA that is read off the past acts in the last layer, and {module} is in "
                    "another; set adapters.targets: all-linear, or method: pfm_embedding"
                )

    def _is_last(self, module: str) -> bool:
        return f".{len(layers_of(self._top)) - 1}." in self._paths[module]

    def keeps_tokens(self, modules: Iterable[str]) -> bool:
        """Whether `tokens` follow from the shared state alone.

        Args:
            modules: The adapted modules on which private parts act; each maps a token by itself.
        """
        paths = [path for module, path in self._paths.items() if self._is_last(module)]
        behind = [path for path in paths if path.endswith(BEHIND_ATTENTION)]
        if len(behind) != 1 or not all(map(self._is_last, modules)):
            return False
        self._last_layer = self._last_layer or LastLayer(self._top, behind[0])
        return True

    @property
    def goes_on(self) -> bool:
        """Whether `states` goes on from `tokens`."""
        return self.tokens is not None and self.tokens.hidden is not None

    def clear(self) -> None:
        """Leave the frozen layers alone."""
        for linear in self._linears.values():
            linear.factors = linear.lora_input = None

    def set_factors(
        self,
        batch: AdaptedRows,
        stacked: Tensors,
        shared_lora: bool,
        private: PrivatePart | None,
        private_weight: float,
        dropout: Dropout | None = None,
    ) -> None:
        """Give every adapted layer the LoRA factors of each row of the batch.

        Args:
            batch: The rows.
            stacked: Every tensor with a leading client dimension [C, ...].
            shared_lora: Whether the shared LoRA is active.
            private: The private part; None: it is not active.
            private_weight: Factor on the private part.
            dropout: The dropout of a training step.
        """
        for name, linear in self._linears.items():
            if self.goes_on and not self._is_last(name):
                continue  # that layer does not run
            shared = own = None
            if shared_lora:
                b = stacked[lora_name(name, "B")] * self._scale
                shared = stacked[lora_name(name, "A")], b
            if private is not None:
                own = private.factors(name, stacked, private_weight)
            active = [factors for factors in (shared, own) if factors is not None]
            linear.factors = linear.lora_input = None
            if not active:
                continue
            dtype = linear.base.weight.dtype
            a = torch.cat([a for a, _ in active], 1).to(dtype)
            b = torch.cat([b for _, b in active], 2).to(dtype)
            linear.factors = (a[batch.row_clients].mT, b[batch.row_clients].mT)
            if dropout is not None:
                both = ((shared, dropout.shared), (own, dropout.private))
                rates = [rate for factors, rate in both if factors is not None]
                ranks = [a.shape[1] for a, _ in active]
                linear.lora_input = LoraInput(dropout, batch, ranks, rates)

    def states(
        self,
        hidden: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor],
        sight: Mapping[str, torch.Tensor],
        dropout: Dropout | None = None,
        twice: bool = False,
    ) -> torch.Tensor:
        """Run the top on hidden states [N, T, d]; its normalised states [K, d] where they are read.

        Args:
            hidden: States below the top, in the backbone's dtype.
            where: Row and token of each output, int64 [K] both, by row.
            sight: Further arguments of a decoder: positions and a mask.
            dropout: That of `set_factors`.
            twice: Whether `states_by_token` is to follow.
        """
        if twice:
            self._again.keeps = True
        if self._last_mlp is not None:
            # Dropout on LoRA inputs is drawn for whole rows, so the last MLP must see whole rows.
            whole = dropout is not None and bool(dropout.shared or dropout.private)
            self._last_mlp.readout = None if whole else Readout.of(*where, len(hidden))
        tokens, last = self.tokens, self._last_layer
        if tokens is None or last is None:
            return self._run(hidden, sight)[where]
        if tokens.hidden is None:
            with last.keeping(tokens, where):
                return self._run(hidden, sight)[where]
        if self._last_mlp is not None:
            self._last_mlp.readout = None
        return last.states(tokens)

    def _run(self, hidden: torch.Tensor, sight: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self._top(inputs_embeds=hidden, use_cache=False, **sight)[0]
        return found

    def states_by_token(
        self,
        batch: AdaptedRows,
        where: tuple[torch.Tensor, torch.Tensor],
        lora: Mapping[str, Factors],
        coefficients: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The states [K, d] of the last `states`, each with a LoRA of its own in the last layer.

        Only the LoRA and its coefficients get a gradient. A module whose output other tokens read
        (a key, a value) must not be among the adapted ones: each state would then depend on the
        coefficients of other tokens too.

        Args:
            batch: The rows, as in `set_factors`.
            where: As in `states`.
            lora: By adapted module A [C, r, in] and B [C, out, r], B times its scale.
            coefficients: By adapted module the coefficients [K, r] at each output.
        """
        shape = len(batch.row_clients), int(batch.row_lengths.max())
        for name, linear in self._linears.items():
            linear.lora_input = None  # as in serving, without dropout
            linear.factors = linear.factors and (
                linear.factors[0].detach(),
                linear.factors[1].detach(),
            )
            if name in lora:
                a, b = (factor.to(linear.base.weight.dtype) for factor in lora[name])
                own = coefficients[name].to(a)
                laid = own.new_zeros(*shape, own.shape[1]).index_put(where, own)
                linear.by_token = a[batch.row_clients].mT, b[batch.row_clients].mT, laid
        if self._last_mlp is not None:
            self._last_mlp.readout = None
        try:
            return self._again()[where]
        finally:
            for linear in self._linears.values():
                linear.by_token = None
