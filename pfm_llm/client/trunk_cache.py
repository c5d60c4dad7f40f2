"""Trunk states of a client's windows, computed once and kept in the client's private folder.

The layers below the lowest adapted one never change, so the trunk states of a window are constant.
They reveal the history and are therefore private data: the files are in the client's own private
folder and are deleted with it.

The windows of a client are always computed together, without other clients, in an order that
depends on them only. The states are therefore the same bits whether they come from the cache, are
recomputed because the budget is used up, or are computed again after a resume.
"""

import contextlib
import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from pfm_llm.base import files
from pfm_llm.base.errors import CorruptFileError, StorageError
from pfm_llm.model.backbone import pad_tokens
from pfm_llm.model.items.reader import ItemReader, Trunk
from pfm_llm.text.encoding import Window, windows_hash

TrunkStates = Callable[[Sequence[Window], str], list[torch.Tensor]]
"""Trunk states [T, d] of each of a client's windows, given with the client's id."""

_log = logging.getLogger(__name__)
TRUNK_TOKENS = 8192
"""Padded tokens of windows in one pass."""
_FOLDER = "trunk"
_CHECKSUM = "crc32"
_HEADER_BYTES = 256
"""Upper bound of a file's size beyond the states."""


@torch.no_grad()
def trunk_states(
    trunk: Trunk, windows: Sequence[Window], batch_tokens: int = TRUNK_TOKENS
) -> list[torch.Tensor]:
    """Compute trunk states, longest windows first.

    Args:
        trunk: What reads windows. None: nothing does, and states are empty, [T, 0].
        windows: At least one; none empty.
        batch_tokens: Bound on padded tokens per forward pass.

    Returns:
        For each window its states [T, d] in the backbone's dtype.
    """
    if trunk is None:
        return [torch.empty(len(window.tokens), 0) for window in windows]
    if isinstance(trunk, ItemReader):
        return trunk.states(windows)
    device = next(trunk.parameters()).device
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].tokens), i))
    longest = len(windows[order[0]].tokens)
    rows_per_batch = max(1, batch_tokens // longest)
    states: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), rows_per_batch):
        rows = order[start : start + rows_per_batch]
        tokens = pad_tokens([windows[i].tokens.tolist() for i in rows]).to(device)
        hidden = trunk(input_ids=tokens, use_cache=False).last_hidden_state
        for row, i in enumerate(rows):
            states[i] = hidden[row, : len(windows[i].tokens)]
    return [states[i] for i in range(len(windows))]


class TrunkCache:
    """Computes trunk states and caches them within a budget.

    Args:
        trunk: As in `trunk_states`. States are kept only where the trunk view of the backbone
            computes them.
        root: A private folder with a folder per client.
        identity: The weights, layers and dtype that the states depend on besides the tokens.
        max_bytes: Budget for all files together; beyond it states are computed each time.
        num_writers: Number of processes that write under ``root``; they share the budget evenly.

    Attributes:
        root: As given.
        hits: How often states were read from the cache.
        misses: How often states were computed.
        seconds: Time that this process has spent on computing them.
    """

    def __init__(
        self,
        trunk: Trunk,
        root: Path,
        identity: str,
        max_bytes: int,
        num_writers: int = 1,
    ) -> None:
        self._trunk = trunk
        self.root = root
        self._identity = identity
        self._max_bytes = max_bytes
        self._num_writers = num_writers
        self._bytes_left: int | None = None
        self.hits = 0
        self.misses = 0
        self.seconds = 0.0

    def states(self, windows: Sequence[Window], client_id: str) -> list[torch.Tensor]:
        """Trunk states of one client's windows.

        Args:
            windows: The windows; none empty.
            client_id: The client, whose private folder keeps the states.

        Returns:
            For each window its states [T, d] in the backbone's dtype, on its device.
        """
        if not windows:
            return []
        if not isinstance(self._trunk, nn.Module):
            return trunk_states(self._trunk, windows)
        lengths = [len(window.tokens) for window in windows]
        path = self.root / client_id / _FOLDER / f"{self._key(windows)}.safetensors"
        states = self._read(path, sum(lengths))
        if states is None:
            self.misses += 1
            started = time.perf_counter()
            states = torch.cat(trunk_states(self._trunk, windows))
            self.seconds += time.perf_counter() - started
            self._write(path, states)
        else:
            self.hits += 1
        return list(states.to(next(self._trunk.parameters()).device).split(lengths))

    def _key(self, windows: Sequence[Window]) -> str:
        text = f"{self._identity}/{windows_hash(windows)}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _read(self, path: Path, num_tokens: int) -> torch.Tensor | None:
        try:
            tensors, header = files.read_tensors(path)
            states = tensors.get("states", torch.empty(0))
            if len(states) != num_tokens or header.get(_CHECKSUM) != _checksum(states):
                raise CorruptFileError(f"{path} is damaged")
        except FileNotFoundError:
            return None
        except CorruptFileError as error:
            _log.warning("trunk cache: %s; computing it again", error)
            with contextlib.suppress(OSError):  # of a folder that cannot be written
                path.unlink(missing_ok=True)
                self._bytes_left = None  # the next write counts the files again
            return None
        except (StorageError, OSError) as error:  # no reason to delete the file
            _log.warning("trunk cache: %s; computing it again", error)
            return None
        return states

    def _write(self, path: Path, states: torch.Tensor) -> None:
        if self._bytes_left is None:
            present = self.root.glob(f"*/{_FOLDER}/*.safetensors")
            free = self._max_bytes - sum(file.stat().st_size for file in present)
            self._bytes_left = free // self._num_writers
        if states.nbytes + _HEADER_BYTES > self._bytes_left:
            return
        try:
            for folder in (self.root, path.parent.parent, path.parent):
                files.make_private_dir(folder)
            files.write_tensors(path, {"states": states}, {_CHECKSUM: _checksum(states)})
        except StorageError as error:
            # The run goes on without the cache when it is full or cannot be written.
            _log.warning("trunk cache: %s; going on without it", error)
            self._bytes_left = 0
            return
        self._bytes_left -= path.stat().st_size


def _checksum(states: torch.Tensor) -> str:
    """CRC-32 of the values. It detects damage on the disk, and takes less time than the read."""
    values = states.detach().cpu().contiguous().view(torch.uint8)
    return f"{zlib.crc32(values.numpy().data):08x}"
