"""The last layer's MLP runs where a state is read out, and nowhere else."""

import torch
from torch import nn

from pfm_llm.model.layers import Readout, ReadoutMlp, read_last_mlp_only


class Counting(nn.Module):
    """Squares its input and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return x * x + 1


def _readout() -> Readout:
    """Row 0 is read at tokens 0 and 3, row 1 at token 2: padding of row 1 points at its token 0."""
    return Readout.of(torch.tensor([0, 0, 1]), torch.tensor([0, 3, 2]), 2)


def test_the_rectangle_holds_each_output_once() -> None:
    readout = _readout()
    assert readout.index.tolist() == [[0, 3], [2, 0]]
    assert readout.valid.tolist() == [[True, True], [True, False]]


def test_outputs_are_those_of_the_whole_mlp_and_the_rest_is_zero() -> None:
    inner = Counting()
    mlp, x = ReadoutMlp(inner), torch.randn(2, 5, 3)
    mlp.readout = _readout()
    found, whole = mlp(x), x * x + 1
    read = torch.zeros(2, 5, dtype=torch.bool)
    read[0, 0] = read[0, 3] = read[1, 2] = True
    assert torch.equal(found[read], whole[read])
    assert not found[~read].any()
    assert inner.shapes == [(2, 2, 3)]


def test_gradients_are_those_of_the_whole_mlp_at_the_outputs() -> None:
    """Token 0 of row 0 is an output and the padding of row 1 points at token 0 as well."""
    x = torch.randn(2, 5, 3, requires_grad=True)
    mlp = ReadoutMlp(Counting())
    mlp.readout = _readout()
    rows, ends = torch.tensor([0, 0, 1]), torch.tensor([0, 3, 2])
    (found,) = torch.autograd.grad(mlp(x)[rows, ends].sum(), x)
    (expected,) = torch.autograd.grad((x * x + 1)[rows, ends].sum(), x)
    assert torch.equal(found, expected)


def test_without_a_readout_every_token_is_computed() -> None:
    x = torch.randn(1, 4, 3)
    assert torch.equal(ReadoutMlp(Counting())(x), x * x + 1)


def test_only_the_last_layer_is_wrapped_and_an_unknown_layout_is_left_alone() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Counting()

    class Decoder(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

    decoder = Decoder(Layer(), Layer())
    wrapped = read_last_mlp_only(decoder)
    assert wrapped is decoder.layers[1].mlp
    assert isinstance(decoder.layers[0].mlp, Counting)
    assert read_last_mlp_only(Decoder(nn.Linear(2, 2))) is None
    assert read_last_mlp_only(nn.Linear(2, 2)) is None
