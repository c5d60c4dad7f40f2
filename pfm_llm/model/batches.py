"""The windows of many clients as one batch, and its dropout."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pfm_llm.protocol.types import Tensors
from pfm_llm.text.encoding import NO_TARGET, Window


@dataclass(frozen=True)
class ChunkBatch:
    """Windows of a chunk of clients, ready for the top.

    A *position* is the last token of an item. Every position receives the ID input of its item. An
    *output* is a position whose state is read out, to train on or to rank with.

    Attributes:
        trunk: [N, T, d] in the backbone's dtype, right-padded with zeros.
        row_clients: int64 [N], index of each row's client in the chunk; ascending.
        rows, ends: int64 [P], row and token index of every position, by client, then row.
        items: int64 [P], the item at each position.
        positions_per_client: How many of the P positions belong to each client.
        outputs: int64 [K], indices of the positions that are read out, ascending.
        num_read: int64 [K], how many items of its row have been read at each output.
        targets: int64 [K], the next item at each output, or `NO_TARGET`.
        later: int64 [K, H - 1], the items after each target up to a horizon of H, or `NO_TARGET`.
        liked: int64 [K], whether the user liked the target, 0 or 1, or `encoding.NO_LABEL`.
        outputs_per_client: How many of the K outputs belong to each client.
        known: int64 [K], how many items of the user's history come before each output's target.
        histories: Per row int64 [H], the user's history up to the row's last target or item.
    """

    trunk: torch.Tensor
    row_clients: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor
    items: torch.Tensor
    positions_per_client: tuple[int, ...]
    outputs: torch.Tensor
    num_read: torch.Tensor
    targets: torch.Tensor
    later: torch.Tensor
    liked: torch.Tensor
    outputs_per_client: tuple[int, ...]
    known: torch.Tensor
    histories: tuple[torch.Tensor, ...]

    @property
    def num_clients(self) -> int:
        """How many clients the chunk has."""
        return len(self.positions_per_client)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and token of each output, int64 [K] both, by row."""
        return self.rows[self.outputs], self.ends[self.outputs]

    @property
    def row_lengths(self) -> torch.Tensor:
        """Tokens of each row without padding, int64 [N]: a row ends with its last item."""
        nothing = torch.zeros_like(self.row_clients)
        return nothing.scatter_reduce(0, self.rows, self.ends + 1, "amax")

    @property
    def histories_per_client(self) -> tuple[torch.Tensor, ...]:
        """Per client the history of its last row, int64 [H]."""
        last = dict(zip(self.row_clients.tolist(), self.histories, strict=True))
        nothing = self.items.new_zeros(0)
        return tuple(last.get(client, nothing) for client in range(self.num_clients))

    @property
    def items_per_client(self) -> tuple[torch.Tensor, ...]:
        """Per client the distinct items of the histories of all its rows, int64 [M], ascending."""
        found: list[list[torch.Tensor]] = [[] for _ in range(self.num_clients)]
        for client, history in zip(self.row_clients.tolist(), self.histories, strict=True):
            found[client].append(history)
        nothing = self.items.new_zeros(0)
        return tuple(torch.cat([nothing, *own]).unique() for own in found)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """For each output the sum [K, D] of the values [I, D] of all items of its row."""
        found = values.new_zeros(len(self.trunk), values.shape[1])
        found = found.index_add(0, self.rows, values[self.items])
        return found[self.rows[self.outputs]]

    def seen(self, num_items: int) -> torch.Tensor:
        """Which items of the catalogue are in the history before each output's target.

        Args:
            num_items: I, the size of the catalogue.

        Returns:
            bool [K, I]; the target itself is False. Every output must have a target.
        """
        # One scatter finds the place at which each item first occurs in each row's history.
        # An item is seen at an output if that place is among the `known` items before the target.
        # The work is O(rows x I + outputs x I), not a loop over outputs, whose histories overlap.
        lengths = torch.tensor([len(history) for history in self.histories])
        row = torch.arange(len(lengths)).repeat_interleave(lengths).to(self.items)
        place = torch.cat([torch.arange(length) for length in lengths]).to(self.items)
        # The table [rows, I] is flat; an item that does not occur keeps a place beyond any history.
        never = self.items.new_full((len(lengths) * num_items,), torch.iinfo(torch.int64).max)
        keys = row * num_items + torch.cat(self.histories)
        first = never.scatter_reduce(0, keys, place, "amin").view(-1, num_items)
        seen = first[self.rows[self.outputs]] < self.known[:, None]
        return seen.scatter(1, self.targets[:, None], False)


def stacked_tensors(
    tensors: Tensors, num_clients: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors with a leading client dimension [C, ...], repeated without a copy."""
    return {
        name: value.to(device).expand(num_clients, *value.shape) for name, value in tensors.items()
    }


def collate(
    windows: Sequence[Sequence[Window]],
    states: Sequence[Sequence[torch.Tensor]],
    last_only: bool = False,
    horizon: int = 1,
) -> ChunkBatch:
    """Put the windows of several clients into one batch.

    Args:
        windows: Per client its windows.
        states: Per client and window the trunk states [T, d].
        last_only: Read out the last position of each window (to rank) instead of every
            position that has a target (to train).
        horizon: How many items after each output are collected, at least 1.
    """
    flat = [(c, w) for c, own in enumerate(windows) for w in own]
    lengths = torch.tensor([len(w) for _, w in flat])
    before = torch.tensor([w.start for _, w in flat])
    row_clients = torch.tensor([c for c, _ in flat])
    rows = torch.arange(len(flat)).repeat_interleave(lengths)
    position_clients = row_clients.repeat_interleave(lengths)
    targets = joined([w.targets for _, w in flat])
    outputs = lengths.cumsum(0) - 1 if last_only else (targets != NO_TARGET).nonzero()[:, 0]
    # A row shows its history from item `before` on: as many items are known beside those it shows.
    num_read = outputs + 1 - (lengths.cumsum(0) - lengths)[rows[outputs]]
    trunk = nn.utils.rnn.pad_sequence([s for own in states for s in own], batch_first=True)
    device = trunk.device
    return ChunkBatch(
        trunk=trunk,
        row_clients=row_clients.to(device),
        rows=rows.to(device),
        ends=joined([w.item_ends for _, w in flat]).to(device),
        items=joined([w.items for _, w in flat]).to(device),
        positions_per_client=_counts(position_clients, len(windows)),
        outputs=outputs.to(device),
        num_read=num_read.to(device),
        targets=targets[outputs].to(device),
        later=_later([w for _, w in flat], horizon)[outputs].to(device),
        liked=joined([w.liked for _, w in flat])[outputs].to(device),
        outputs_per_client=_counts(position_clients[outputs], len(windows)),
        known=(num_read + before[rows[outputs]]).to(device),
        histories=tuple(joined([w.met]).to(device) for _, w in flat),
    )


def _later(windows: Sequence[Window], horizon: int) -> torch.Tensor:
    """The items after the target of each position, int64 [P, horizon - 1]; see `ChunkBatch`."""
    if horizon == 1:
        return torch.empty(sum(map(len, windows)), 0, dtype=torch.int64)
    found = []
    for window in windows:
        stop = window.start + len(window) + horizon
        after = window.history.items[window.start : stop].astype(np.int64)
        padded = np.append(after, np.full(horizon, NO_TARGET))
        stretches = np.lib.stride_tricks.sliding_window_view(padded, horizon - 1)
        found.append(stretches[2 : 2 + len(window)])
    return torch.from_numpy(np.concatenate(found))


def joined(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """The arrays one after another, int64; empty without arrays."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays])).long()


def _counts(clients: torch.Tensor, num_clients: int) -> tuple[int, ...]:
    return tuple(clients.bincount(minlength=num_clients).tolist())


def spans(counts: Sequence[int]) -> list[slice]:
    """The slice of each client in a tensor that holds ``counts[c]`` entries of client c in turn."""
    stops = list(itertools.accumulate(counts))
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


@dataclass(frozen=True)
class Dropout:
    """The dropout of one training step.

    Each client has its own generator. The factors of a client depend on its own windows alone, not
    on the padding or on the other clients of the chunk.

    Attributes:
        head: Rate on the user vectors.
        taste: Rate on user embeddings that are a weighted sum over the history.
        shared, private: Rates on the inputs of each adapter's factors A, as in PEFT.
        generators: By index of the client in the chunk.
        items: Share of the items that are treated as new.
    """

    head: float
    taste: float
    shared: float
    private: float
    generators: Sequence[torch.Generator]
    items: float = 0.0

    def keep(self, shape: Sequence[int], rate: float, client: int) -> torch.Tensor:
        """A client's next factors of a shape: 0 with probability ``rate``, else 1/(1 - rate)."""
        uniform = torch.rand(*shape, generator=self.generators[client])
        return (uniform >= rate) / (1 - rate)
