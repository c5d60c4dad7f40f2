"""Products of private tensors with shared ones, as runs of eight numbers of each.

A private LoRA may be s B diag(c) A, where c [r] alone is private. No number of c stands in the
factor s B diag(c), in diag(c) A or in the whole product, but whoever also has A and B can divide.
Where a factor is private itself, the LoRA as it is served has s times that factor.

A product is of use as a whole, so a few runs of it are enough to find it. The eight numbers of a
run are linear in c: they are W c, with a matrix W [8, r] that follows from the shared factors. So
a run costs a client one small product, whatever the size of the factors.
"""

from collections.abc import Iterable, Iterator

import torch

from pfm_llm.protocol.types import Tensors

RUN = 8
"""Length of a run: the numbers in a row that `leak_search` asks for."""

_NUM_RUNS = 4  # of a product in a layout
_NUM_TRIED = 256  # places at which a run without a zero is looked for
_CHANGE = 0.02


class Products:
    """The products to look for.

    No kind of private part is known here. A factor is any shared matrix with as many rows or
    columns as a private vector has numbers, and each ``<name>.B`` with ``<name>.A`` is a pair.

    Args:
        shared: The shared tensors that private parts are made with, of one state or of several.
        scales: Factors on a product; 1 is always among them.
    """

    def __init__(self, shared: Iterable[Tensors], scales: Iterable[float] = ()) -> None:
        self._shared: list[Tensors] = []
        for tensors in shared:
            if not any(_are_equal(tensors, other) for other in self._shared):
                self._shared.append(tensors)
        self._scales = sorted({1.0, *scales})
        self._maps: dict[int, torch.Tensor] = {}

    def runs(self, private: torch.Tensor) -> torch.Tensor:
        """Runs of the products of a private tensor, float64 [n, RUN].

        A vector that is nearly one of ones leaves a factor as it is. Its product stands in every
        honest folder and tells nothing, so it has no runs.
        """
        value = private.detach().cpu().double()
        runs = [scale * run for scale in self._scales if scale != 1 for run in _runs_of(value)]
        if value.dim() == 1:
            maps = self._maps_of(len(value))
            factor = maps.sum(-1)
            for scale in self._scales:
                product = scale * (maps @ value)
                runs.append(product[((product - factor).abs() > _CHANGE * factor.abs()).any(-1)])
        return torch.cat([torch.empty(0, RUN).double(), *runs])

    def _maps_of(self, width: int) -> torch.Tensor:
        """From a vector [width] to the runs of its products: W, float64 [n, RUN, width]."""
        if width not in self._maps:
            maps = [torch.empty(0, RUN, width).double()]
            for tensors in self._shared:
                for name, matrix in tensors.items():
                    maps += _maps_of_factor(matrix, width)
                    if name.endswith(".B") and (a := tensors.get(f"{name[:-1]}A")) is not None:
                        maps += _maps_of_pair(matrix, a, width)
            self._maps[width] = torch.cat(maps)
        return self._maps[width]


def _runs_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Runs of a tensor itself, in both layouts where it is a matrix."""
    layouts = (tensor, tensor.T) if tensor.dim() == 2 else (tensor.reshape(1, -1),)
    return [layout[_places(layout)] for layout in layouts]


def _maps_of_factor(matrix: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """The runs of ``M diag(c)`` and ``diag(c) M``, whichever fits, in both layouts."""
    for layout in (matrix, matrix.T) if matrix.dim() == 2 else ():
        places = _places(layout)
        for length, index in zip(layout.shape, places, strict=True):
            if length == width:  # c goes along this dimension
                maps = torch.zeros(len(index), RUN, width).double()
                yield maps.scatter_(2, index[..., None], layout[places].double()[..., None])


def _maps_of_pair(b: torch.Tensor, a: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """The runs of ``B diag(c) A``, in both layouts."""
    if not (b.dim() == a.dim() == 2 and b.shape[1] == len(a) == width):
        return
    for left, right in ((b, a), (a.T, b.T)):
        if right.shape[1] >= RUN:
            rows = left.ne(0).all(1)
            columns = right.ne(0).all(0).unfold(0, RUN, 1).all(1)
            places = (_spread(whole.nonzero().flatten()).tolist() for whole in (rows, columns))
            for row, start in zip(*places, strict=False):
                yield (left[row].double() * right[:, start : start + RUN].T)[None]


def _places(layout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns [n, RUN] of at most `_NUM_RUNS` runs of a matrix without a zero.

    Where a row is as long as a run, no run goes beyond its row, since a factor may be a part of a
    wider matrix.
    """
    if layout.numel() < RUN:
        return (torch.empty(0, RUN).long(),) * 2
    starts = torch.linspace(0, layout.numel() - RUN, _NUM_TRIED, dtype=torch.float64).long()
    length = layout.shape[1]
    if length >= RUN:
        starts -= (starts % length - (length - RUN)).clamp_min(0)
    places = starts.unique()[:, None] + torch.arange(RUN)
    rows, columns = places // length, places % length
    chosen = _spread(layout[rows, columns].ne(0).all(1).nonzero().flatten())
    return rows[chosen], columns[chosen]


def _spread(places: torch.Tensor) -> torch.Tensor:
    """At most `_NUM_RUNS` of some places, evenly."""
    chosen = torch.linspace(0, len(places) - 1, min(_NUM_RUNS, len(places)))
    return places[chosen.long()]


def _are_equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
