"""The MLP of the last layer, run only on the tokens whose state is read out.

Nothing uses the last layer's output between item ends, and an MLP maps each token independently.
About four fifths of the tokens can therefore be skipped without changing any score. With few
adapted layers this saves a good part of all work.
"""

from dataclasses import dataclass

import torch
from torch import nn


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


def read_last_mlp_only(top: nn.Module) -> ReadoutMlp | None:
    """Replace the MLP of the top's last layer; None when the architecture has none by that name.

    Args:
        top: A decoder with one list of layers.
    """
    layers = next((m for m in top.children() if isinstance(m, nn.ModuleList)), None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if layers is None or not isinstance(mlp, nn.Module):
        return None
    wrapped = ReadoutMlp(mlp)
    layers[-1].mlp = wrapped
    return wrapped
