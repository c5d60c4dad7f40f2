"""A search of files for private tensors: as they are, transposed, in other dtypes, or as text.

A tensor counts as found when a file holds eight consecutive numbers of it, at any place of the file
and of the tensor. Eight numbers with a zero among them, or with fewer than `MIN_DISTINCT` different
values, prove nothing and are ignored.

The files are indexed once; the private states are read one at a time and looked up in the index.
Memory is about 50 bytes for each byte of the files, plus one state.
"""

import base64
import binascii
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pfm_llm.base.errors import StorageError
from pfm_llm.protocol.types import PrivateState

RUN = 8
MIN_DISTINCT = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEXT = "text"

_KEY_BYTES = 8
_GAP = bytes(RUN * _KEY_BYTES)
# Relative; torch prints small numbers with about three significant digits.
_TOLERANCE = 5e-3
_NUM_PAIRS = 1 << 20
_PAIR_FACTOR = 2063
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){16,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, order=True)
class Finding:
    """A private tensor in a file.

    Attributes:
        file: Path in the searched folder.
        client_id: The client whose tensor it is.
        tensor: Its name in the private state.
        dtype: Its form in the file, such as ``bfloat16``; ``text`` for decimal numbers.
    """

    file: str
    client_id: str
    tensor: str
    dtype: str


def find_private(folder: Path, states: Iterable[PrivateState]) -> list[Finding]:
    """Search all files below a folder for tensors of private states.

    Args:
        folder: The folder to publish.
        states: Private states of any clients and versions; each is read once.

    Returns:
        The findings, sorted; one for each file, client, tensor and form.

    Raises:
        StorageError: A file cannot be read.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                contents[path.relative_to(folder).as_posix()] = path.read_bytes()
            except OSError as error:
                raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    return find_private_in(contents, states)


def find_private_in(contents: Mapping[str, bytes], states: Iterable[PrivateState]) -> list[Finding]:
    """`find_private` in files whose contents are given by name."""
    raw, spelt = _ByteIndex(contents), _NumberIndex(contents)
    found: set[Finding] = set()
    for state in states:
        for name, numbers in _rows(state):
            in_form = {TEXT: spelt.find(numbers.numpy())}
            for dtype in DTYPES:
                bits = numbers.to(dtype).view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
                in_form[str(dtype).removeprefix("torch.")] = raw.find(bits)
            for form, names in in_form.items():
                found |= {Finding(file, state.client_id, name, form) for file in names}
    return sorted(found)


def _rows(state: PrivateState) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and numbers, float32 [n], of each tensor: as it is and, if a matrix, transposed."""
    for name, tensor in state.tensors.items():
        value = tensor.detach().cpu().float()
        for layout in (value, value.T) if value.dim() == 2 else (value,):
            yield name, layout.reshape(-1)


class _ByteIndex:
    """The eight bytes at every offset of some contents, as a sorted index of 64-bit keys.

    Numbers may stand at any offset, so every offset gets a key. A search for a tensor needs only
    some keys of it: with b bytes a number, a key spans 8/b numbers, so any stretch of eight numbers
    holds 8 - 8/b + 1 keys that begin at a number. If every (8 - 8/b + 1)th key of the tensor is
    looked up, each stretch contains one of them. A found key is only a candidate; then the
    stretches around it are searched for.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        # The gaps of zeros keep a stretch from reaching from one piece into the next.
        self._contents = {
            name: b"".join(view + _GAP for view in _views(content))
            for name, content in contents.items()
        }
        self._keys = np.sort(np.concatenate([_keys(_GAP), *map(_keys, self._contents.values())]))

    def find(self, numbers: np.ndarray) -> set[str]:
        """Names of the contents that hold a stretch of numbers.

        Args:
            numbers: The bits of the numbers, as unsigned integers of the width of their dtype.
        """
        if len(numbers) < RUN:
            return set()
        per_key = _KEY_BYTES // numbers.itemsize
        step = RUN - per_key + 1
        keys = _joined(sliding_window_view(numbers, per_key)[::step])
        order = np.argsort(keys)  # sorted keys are looked up several times faster
        there = np.searchsorted(self._keys, keys[order]).clip(max=len(self._keys) - 1)
        places = step * order[self._keys[there] == keys[order]]
        starts = np.unique(places[:, None] - np.arange(step))
        starts = starts[(starts >= 0) & (starts <= len(numbers) - RUN)]
        stretches = sliding_window_view(numbers, RUN)[starts]
        stretches = stretches[_is_telling(stretches)]
        return {name for name in self._contents if len(stretches) and self._has(name, stretches)}

    def _has(self, name: str, stretches: np.ndarray) -> bool:
        """Whether a content holds one of the stretches [n, RUN]."""
        content, per_key = self._contents[name], _KEY_BYTES // stretches.itemsize
        likely = stretches[np.isin(_joined(stretches[:, :per_key]), _keys(content))]
        return any(stretch.tobytes() in content for stretch in likely)


def _keys(content: bytes) -> np.ndarray:
    """The eight bytes at every offset of a content of at least eight bytes."""
    return _joined(sliding_window_view(np.frombuffer(content, np.uint8), _KEY_BYTES))


def _joined(rows: np.ndarray) -> np.ndarray:
    """Rows of eight bytes each as uint64 keys."""
    return np.ascontiguousarray(rows).view(np.uint64).reshape(-1)


class _NumberIndex:
    """The decimal numbers in the text of some contents.

    Printed numbers are rounded, so they are compared within `_TOLERANCE`. A bucket is the upper
    half of a float32. `_pairs` marks the buckets of neighbouring numbers in the text, for every
    rounding within the tolerance. Eight numbers of a tensor are compared one by one only if their
    four pairs are all marked.

    Attributes:
        _numbers: The numbers in order of appearance, with zeros between contents.
        _starts: Indices at which a stretch begins that proves something; see `_is_telling`.
        _pairs: bool [_NUM_PAIRS], by hash of the buckets of two consecutive numbers.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._names, rows = [], []
        for name, content in contents.items():
            text = _as_text(content)
            if text is not None:
                self._names.append(name)
                spelt = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
                rows.append(np.array([*map(float, spelt), *[0.0] * RUN]))
        self._ends = np.cumsum([len(row) for row in rows])
        numbers = np.concatenate([*rows, np.zeros(RUN)])
        with np.errstate(over="ignore", under="ignore"):
            numbers[~np.isfinite(numbers.astype(np.float32))] = 0
            exact, low, high = (
                _buckets((numbers * factor).astype(np.float32))
                for factor in (1, 1 - _TOLERANCE, 1 + _TOLERANCE)
            )
        self._numbers = numbers
        # Numbers of one bucket count as equal: a row of similar numbers proves nothing.
        self._starts = np.flatnonzero(_is_telling(sliding_window_view(exact, RUN)))
        first = np.unique(self._starts[:, None] + np.arange(RUN - 1))
        self._pairs = np.zeros(_NUM_PAIRS, bool)
        widest = int((high - low)[np.append(first, first + 1)].max(initial=0))
        for one, other in itertools.product(range(widest + 1), repeat=2):
            near = [np.minimum(low + np.uint16(offset), high) for offset in (one, other)]
            self._pairs[_pair_slots(near[0][first], near[1][first + 1])] = True

    def find(self, values: np.ndarray) -> set[str]:
        """Names of the contents that spell a stretch of float32 numbers."""
        found: set[str] = set()
        if not len(self._starts) or len(values) < RUN:
            return found
        buckets = _buckets(values)
        near = self._pairs[_pair_slots(buckets[:-1], buckets[1:])]
        # After both steps: whether the four pairs of the eight numbers from a place are marked.
        for width in (2, 4):
            near = near[:-width] & near[width:]
        for place in np.flatnonzero(near).tolist():
            stretch = values[place : place + RUN].astype(np.float64)
            starts = self._starts
            for offset in range(RUN):
                there = self._numbers[starts + offset]
                starts = starts[np.abs(there - stretch[offset]) <= _TOLERANCE * np.abs(there)]
            found |= {self._names[i] for i in np.searchsorted(self._ends, starts, side="right")}
        return found


def _is_telling(stretches: np.ndarray) -> np.ndarray:
    """Which stretches [..., RUN] prove something: no zero, and enough different values.

    Args:
        stretches: The bits of the numbers, or their upper half, as unsigned integers.
    """
    magnitudes = stretches << stretches.dtype.type(1)  # without the sign, which is the first bit
    num_distinct = 1 + (np.diff(np.sort(stretches, axis=-1), axis=-1) != 0).sum(-1)
    return (magnitudes != 0).all(-1) & (num_distinct >= MIN_DISTINCT)


def _buckets(values: np.ndarray) -> np.ndarray:
    """Bucket of each float32 number: its sign, and its magnitude to about half a percent."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _pair_slots(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Index in `_NumberIndex._pairs` of two consecutive buckets."""
    return (one.astype(np.int32) * np.int32(_PAIR_FACTOR) + other) & np.int32(_NUM_PAIRS - 1)


def _as_text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _views(content: bytes) -> Iterator[bytes]:
    """A content as it is, and every decoded piece of hexadecimal digits or base64 in it."""
    yield content
    text = _as_text(content)
    if text is None:
        return
    for match in _HEX.findall(text):
        yield bytes.fromhex(match)
    for match in _BASE64.findall(text):
        try:
            yield base64.b64decode(match + "=" * (-len(match) % 4))
        except binascii.Error:
            continue
