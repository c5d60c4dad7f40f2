"""A search of files for private tensors: as they are, transposed, in other dtypes, or as text.

A tensor counts as found when a file holds eight consecutive numbers of it, at any place of the file
and of the tensor. Eight numbers with a zero among them, or with fewer than `MIN_DISTINCT` different
values, prove nothing and are ignored. Products of private tensors with shared ones (`products`) are
looked for by a few runs of each, which any whole product holds.

The files are indexed once; the private states are read in batches and looked up in the index.
Memory is about 50 bytes for each byte of the files, plus a batch.
"""

import base64
import binascii
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pfm_llm.base.errors import StorageError
from pfm_llm.protocol.types import PrivateState
from pfm_llm.publish.products import RUN, Products

MIN_DISTINCT = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEXT = "text"
PRODUCT = "product as "

_KEY_BYTES = 8
_GAP = bytes(RUN * _KEY_BYTES)
# Relative; torch prints small numbers with about three significant digits.
_TOLERANCE = 5e-3
_NUM_PAIRS = 1 << 20
_PAIR_FACTOR = 2063
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){16,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
_BATCH = 1 << 17
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, order=True)
class Finding:
    """A private tensor in a file.

    Attributes:
        file: Path in the searched folder.
        client_id: The client whose tensor it is.
        tensor: Its name in the private state.
        dtype: Its form in the file, such as ``bfloat16``; ``text`` for decimal numbers; after
            `PRODUCT` where a product of it is there.
    """

    file: str
    client_id: str
    tensor: str
    dtype: str


def find_private(
    folder: Path, states: Iterable[PrivateState], products: Products | None = None
) -> list[Finding]:
    """Search all files below a folder for tensors of private states.

    Args:
        folder: The folder to publish.
        states: Private states of any clients and versions; each is read once.
        products: The products to look for too; None: none.

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
    return find_private_in(contents, states, products)


def find_private_in(
    contents: Mapping[str, bytes],
    states: Iterable[PrivateState],
    products: Products | None = None,
) -> list[Finding]:
    """`find_private` in files whose contents are given by name."""
    index = _Index(contents, products is not None)
    found: set[Finding] = set()
    for batch in _batches(states):
        found |= _found(batch, _layouts, index.find)
        if products is not None:
            found |= _found(batch, products.runs, index.find_products, PRODUCT)
    return sorted(found)


def _batches(states: Iterable[PrivateState]) -> Iterator[list[PrivateState]]:
    """The states in batches of about `_BATCH` numbers."""
    batch, size = [], 0
    for state in states:
        batch.append(state)
        size += sum(tensor.numel() for tensor in state.tensors.values())
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _found(
    states: Iterable[PrivateState],
    numbers_of: Callable[[torch.Tensor], torch.Tensor],
    find: Callable[[torch.Tensor], dict[str, set[str]]],
    prefix: str = "",
) -> set[Finding]:
    """What is found of some states.

    Args:
        states: Private states.
        numbers_of: From a private tensor to the numbers to look for.
        find: From numbers to the names of files, by form.
        prefix: Of the forms in the findings.
    """
    numbers = [
        (state.client_id, name, numbers_of(tensor).reshape(-1))
        for state in states
        for name, tensor in state.tensors.items()
    ]
    gap = torch.zeros(RUN)  # no stretch with a zero is looked for
    joined = torch.cat([gap, *(piece for *_, one in numbers for piece in (one, gap))])
    if not any(find(joined).values()):
        return set()  # nearly always, and one look for all of them is the fastest
    return {
        Finding(file, client_id, name, prefix + form)
        for client_id, name, one in numbers
        for form, names in find(one).items()
        for file in names
    }


def _layouts(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, float32: as they are and, if it is a matrix, transposed."""
    value = tensor.detach().cpu().float()
    if value.dim() != 2:
        return value.reshape(-1)
    return torch.cat([value.reshape(-1), torch.zeros(RUN), value.T.reshape(-1)])


class _Index:
    """Some contents, indexed for each form of numbers.

    The order of its factors decides the last bits of a product, and the order of its terms those of
    a sum. So products in single and double precision are compared by the upper halves of float32,
    which hold sign, exponent and seven bits. A number near the end of such an interval may fall
    into the next one; other runs of the product are found then. In half precision the last bits of
    float32 hardly ever show.
    """

    def __init__(self, contents: Mapping[str, bytes], with_products: bool) -> None:
        views = {name: list(_views(content)) for name, content in contents.items()}
        self._spelt, self._raw = _NumberIndex(contents), _ByteIndex(views)
        self._halves = {
            dtype: _ByteIndex({name: _halves(of, dtype) for name, of in views.items()}, every=2)
            for dtype in (torch.float32, torch.float64)
            if with_products
        }

    def find(self, numbers: torch.Tensor) -> dict[str, set[str]]:
        """By form the names of the contents that hold a stretch of numbers [n]."""
        return self._find(numbers, {})

    def find_products(self, numbers: torch.Tensor) -> dict[str, set[str]]:
        """`find` for products, whatever the order in which they were rounded."""
        return self._find(numbers, self._halves)

    def _find(
        self, numbers: torch.Tensor, halves: Mapping[torch.dtype, "_ByteIndex"]
    ) -> dict[str, set[str]]:
        single = numbers.float().numpy()
        found = {TEXT: self._spelt.find(single)}
        for dtype in DTYPES:
            bits = numbers.to(dtype).view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
            found[str(dtype).removeprefix("torch.")] = (
                halves[dtype].find(_buckets(single)) if dtype in halves else self._raw.find(bits)
            )
        return found


def _halves(views: Iterable[bytes], dtype: torch.dtype) -> Iterator[bytes]:
    """The upper halves of the numbers at every offset of some contents, as float32."""
    for view in views:
        for offset in range(size := dtype.itemsize):
            whole = view[offset : len(view) - (len(view) - offset) % size]
            with np.errstate(all="ignore"):  # most of them are no numbers
                yield _buckets(np.frombuffer(whole, f"<f{size}").astype(np.float32)).tobytes()


class _ByteIndex:
    """The eight bytes at every offset of some contents, as a sorted index of 64-bit keys.

    Numbers may stand at any offset, so every offset gets a key. A search for a tensor needs only
    some keys of it: with b bytes a number, a key spans 8/b numbers, so any stretch of eight numbers
    holds 8 - 8/b + 1 keys that begin at a number. If every (8 - 8/b + 1)th key of the tensor is
    looked up, each stretch contains one of them. A found key is only a candidate; then the
    stretches around it are searched for.
    """

    def __init__(self, views: Mapping[str, Iterable[bytes]], every: int = 1) -> None:
        """Index the views of each content, at offsets that are multiples of ``every``."""
        # The gaps of zeros keep a stretch from reaching from one piece into the next.
        self._contents = {
            name: b"".join(view + _GAP for view in of_one) for name, of_one in views.items()
        }
        keys = [_keys(content)[::every] for content in (_GAP, *self._contents.values())]
        self._keys = np.sort(np.concatenate(keys))

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
        places = step * order[self._knows(keys[order])]
        starts = np.unique(places[:, None] - np.arange(step))
        starts = starts[(starts >= 0) & (starts <= len(numbers) - RUN)]
        stretches = sliding_window_view(numbers, RUN)[starts]
        stretches = stretches[_is_telling(stretches)]
        for end in (slice(per_key), slice(-per_key, None)):
            stretches = stretches[self._knows(_joined(stretches[:, end]))]
        return {name for name in self._contents if len(stretches) and self._has(name, stretches)}

    def _knows(self, keys: np.ndarray) -> np.ndarray:
        """Which keys are in the index."""
        there = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        known: np.ndarray = self._keys[there] == keys
        return known

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
