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
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_MIX = np.uint64(0x9E3779B97F4A7C15)
_PAIRS_AT_ONCE = 1 << 14
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
        numbers = _Numbers.of(state)
        for dtype in DTYPES:
            form = str(dtype).removeprefix("torch.")
            for place, file in raw.find(_as_unsigned(numbers.values.to(dtype))):
                found.add(Finding(file, state.client_id, numbers.tensor_at(place), form))
        for place, file in spelt.find(numbers.values.numpy()):
            found.add(Finding(file, state.client_id, numbers.tensor_at(place), TEXT))
    return sorted(found)


@dataclass(frozen=True)
class _Numbers:
    """All numbers of a state in one row: each tensor as it is and, if a matrix, transposed."""

    values: torch.Tensor
    names: list[str]
    ends: np.ndarray

    @classmethod
    def of(cls, state: PrivateState) -> "_Numbers":
        names, rows = [], []
        for name, tensor in state.tensors.items():
            value = tensor.detach().cpu().float()
            layouts = [value, value.T] if value.dim() == 2 and min(value.shape) > 1 else [value]
            names += [name] * len(layouts)
            rows += [layout.reshape(-1) for layout in layouts]
        ends = np.cumsum([len(row) for row in rows])
        return cls(torch.cat(rows) if rows else torch.empty(0), names, ends)

    def tensor_at(self, place: int) -> str:
        """The name of the tensor that a number belongs to."""
        return self.names[int(np.searchsorted(self.ends, place, side="right"))]


class _ByteIndex:
    """The eight bytes at every offset of some contents, as a sorted index of 64-bit keys.

    Numbers may stand at any offset, so every offset gets a key. A search for a tensor needs only
    some keys of it: with b bytes a number, a key spans 8/b numbers, so any stretch of eight numbers
    holds 8 - 8/b + 1 keys that begin at a number. If every (8 - 8/b + 1)th key of the tensor is
    looked up, each stretch contains one of them. A found key is only a candidate; then all
    stretches around it are compared number by number.

    Attributes:
        _keys: All keys except zero, sorted; `_places` are their offsets in `_bytes`.
        _bitmap: One bit for each hash of a key. Most keys of a tensor are absent from the files;
            the bitmap says so without a binary search.
    """

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        pieces = [(name, view) for name, content in contents.items() for view in _views(content)]
        self._names = [name for name, _ in pieces]
        # The gaps of zeros keep a stretch from reaching from one content into the next.
        padded = b"".join(_GAP + view for _, view in pieces) + _GAP
        self._ends = np.cumsum([len(_GAP) + len(view) for _, view in pieces])
        self._bytes = np.frombuffer(padded, dtype=np.uint8)
        # Eight aligned views, each shifted by one byte, cover every offset.
        words = [
            np.frombuffer(padded, "<u8", (len(padded) - shift) // _KEY_BYTES, shift)
            for shift in range(_KEY_BYTES)
        ]
        places = [np.flatnonzero(word) * _KEY_BYTES + shift for shift, word in enumerate(words)]
        keys = np.concatenate([word[word != 0] for word in words])
        order = np.argsort(keys)
        self._keys = keys[order]
        self._places = np.concatenate(places)[order]
        # At least 128 bits per key: fewer than one absent key in a hundred finds its bit set.
        self._bits = max(16, (128 * len(keys)).bit_length())
        self._bitmap = np.zeros(1 << (self._bits - 3), np.uint8)
        np.bitwise_or.at(self._bitmap, *self._slots(self._keys))

    def find(self, numbers: np.ndarray) -> Iterator[tuple[int, str]]:
        """Find stretches of numbers in the contents.

        Args:
            numbers: The bits of the numbers, as unsigned integers of the width of their dtype.

        Yields:
            Index of a number in a found stretch, and the name of the content.
        """
        per_key = _KEY_BYTES // numbers.itemsize
        step = RUN - per_key + 1
        if len(numbers) < RUN or not len(self._keys):
            return
        keys = np.ascontiguousarray(sliding_window_view(numbers, per_key)[::step])
        keys = keys.view(np.uint64).reshape(-1)
        slots, masks = self._slots(keys)
        # First the bitmap, then a binary search for the keys that it lets through.
        maybe = np.flatnonzero(self._bitmap[slots] & masks)
        first = np.searchsorted(self._keys, keys[maybe])
        is_there = self._keys[np.minimum(first, len(self._keys) - 1)] == keys[maybe]
        if not is_there.any():
            return
        maybe, first = maybe[is_there], first[is_there]
        count = np.searchsorted(self._keys, keys[maybe], side="right") - first
        maybe *= step  # from the index of a key to the index of its first number
        # With zeros at both ends every key has a full set of stretches around it.
        numbers = np.pad(numbers, RUN)
        telling = _is_telling(_around(numbers, maybe + RUN, per_key)).any(1)
        for place, start, length in zip(
            maybe[telling].tolist(), first[telling].tolist(), count[telling].tolist(), strict=True
        ):
            for name in self._confirmed(numbers, place, self._places[start : start + length]):
                yield place, name

    def _confirmed(self, numbers: np.ndarray, place: int, at: np.ndarray) -> set[str]:
        """Names of the contents that hold a whole stretch around one key of a tensor.

        Args:
            numbers: The padded numbers of the tensor.
            place: Index of the key's first number, without padding.
            at: Offsets in `_bytes` at which the key stands.
        """
        per_key = _KEY_BYTES // numbers.itemsize
        around = _around(numbers, np.array([place + RUN]), per_key)
        size = numbers.itemsize
        # The bytes from the start of the earliest stretch with this key to the end of the latest.
        relative = np.arange(-(RUN - per_key) * size, RUN * size)
        found: set[str] = set()
        for start in range(0, len(at), _PAIRS_AT_ONCE):
            some = at[start : start + _PAIRS_AT_ONCE]
            there = self._bytes[some[:, None] + relative].view(numbers.dtype)
            equal = sliding_window_view(there, RUN, axis=1) == around
            is_found = (equal.all(2) & _is_telling(around)).any(1)
            files = np.searchsorted(self._ends, some[is_found], side="right")
            found |= {self._names[file] for file in np.unique(files).tolist()}
        return found

    def _slots(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Byte and bit of the bitmap for each key."""
        hashes = (keys * _MIX) >> np.uint64(64 - self._bits)
        masks = np.left_shift(np.uint8(1), (hashes & np.uint64(7)).astype(np.uint8))
        return (hashes >> np.uint64(3)).view(np.int64), masks


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

    def find(self, values: np.ndarray) -> Iterator[tuple[int, str]]:
        """Places of float32 numbers that begin a found stretch."""
        if not len(self._starts) or len(values) < RUN:
            return
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
            for file in set(np.searchsorted(self._ends, starts, side="right").tolist()):
                yield place, self._names[file]


def _around(numbers: np.ndarray, places: np.ndarray, per_key: int) -> np.ndarray:
    """For each place, the stretches [stretches, RUN] of numbers that contain the key there."""
    first = places[:, None] - (RUN - per_key) + np.arange(RUN - per_key + 1)
    return numbers[first[:, :, None] + np.arange(RUN)]


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


def _as_unsigned(values: torch.Tensor) -> np.ndarray:
    size = values.element_size()
    return values.contiguous().view(torch.uint8).numpy().view(_UNSIGNED[size])


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
