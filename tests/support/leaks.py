"""A hunt for tensors in bytes: in any dtype, in any place, as they are or spelt out as text.

A tensor counts as found when eight consecutive numbers of it are, so a copy of a part is found
too; eight zeros, or eight numbers that hardly differ, prove nothing and are not looked for.
"""

import base64
import binascii
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

RUN = 8
MIN_DISTINCT = 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_KEY = 8
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){16,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_PNG = b"\x89PNG\r\n\x1a\n"


class Needles:
    """Byte strings of at least eight bytes, each with a label, searched all at once."""

    def __init__(self) -> None:
        self._labels: dict[int, dict[bytes, str]] = defaultdict(dict)
        self._keys: np.ndarray | None = None

    def __len__(self) -> int:
        return sum(map(len, self._labels.values()))

    def add(self, needle: bytes, label: str) -> None:
        """Look for ``needle``, which is called ``label``."""
        self._labels[int.from_bytes(needle[:_KEY], "little")].setdefault(needle, label)
        self._keys = None

    def labels(self) -> set[str]:
        """All labels."""
        return {label for needles in self._labels.values() for label in needles.values()}

    def find(self, haystack: bytes) -> set[str]:
        """Labels of what is in ``haystack``, at any offset."""
        if self._keys is None:
            self._keys = np.array(sorted(self._labels), dtype="<u8")
        found = set()
        for shift in range(min(_KEY, len(haystack))):
            count = (len(haystack) - shift) // _KEY
            words = np.frombuffer(haystack, dtype="<u8", count=count, offset=shift)
            if not count or not len(self._keys):
                break
            places = np.searchsorted(self._keys, words).clip(max=len(self._keys) - 1)
            for hit in np.flatnonzero(self._keys[places] == words):
                for needle, label in self._labels[int(words[hit])].items():
                    if haystack.startswith(needle, shift + _KEY * int(hit)):
                        found.add(label)
        return found


class Hunt:
    """Learns tensors, and says which of them are in some bytes.

    Labels are ``<owner>/<name> <form>``, where the form is ``value`` or ``delta`` (the change
    since this name was learnt last), and a dtype or ``text``.
    """

    def __init__(self) -> None:
        self.binary = Needles()
        self.numbers = Needles()
        self._last: dict[tuple[str, str], torch.Tensor] = {}

    def learn(self, owner: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look for these tensors, for their transposes, and for how each has changed."""
        for name, tensor in tensors.items():
            value = tensor.detach().cpu().clone()
            old = self._last.get((owner, name))
            if old is not None and torch.equal(old, value):
                continue
            self._last[owner, name] = value
            self._add(f"{owner}/{name} value", value)
            if old is not None:
                self._add(f"{owner}/{name} delta", value - old)

    def learn_integers(self, label: str, values: np.ndarray) -> None:
        """Look for a run of whole numbers, as integers of any width and as text."""
        for window in _windows(torch.from_numpy(np.asarray(values, dtype=np.int64))).numpy():
            for dtype in ("<i2", "<i4", "<i8"):
                self.binary.add(window.astype(dtype).tobytes(), f"{label} {dtype}")
            self.numbers.add(_four_digits(window.tolist()), f"{label} text")

    def find(self, content: bytes) -> set[str]:
        """Labels of what is in ``content``: raw, compressed as in PNG, or spelt out in text."""
        found = set()
        for haystack in _views(content):
            found |= self.binary.find(haystack)
        text = _as_text(content)
        if text is not None:
            found |= self.numbers.find(_four_digits(map(float, _NUMBER.findall(text))))
        return found

    def search(self, things: Mapping[str, bytes]) -> dict[str, set[str]]:
        """Per name of a thing, the labels found in it; things with none are left out."""
        found = {name: self.find(content) for name, content in things.items()}
        return {name: labels for name, labels in found.items() if labels}

    def _add(self, label: str, tensor: torch.Tensor) -> None:
        layouts = [tensor, tensor.T] if tensor.dim() == 2 else [tensor]
        for layout in layouts:
            for dtype in DTYPES:
                for raw in _windows(layout.to(dtype)).view(torch.uint8).numpy():
                    self.binary.add(raw.tobytes(), f"{label} {str(dtype).removeprefix('torch.')}")
            for numbers in _windows(layout).tolist():
                self.numbers.add(_four_digits(numbers), f"{label} text")


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _windows(tensor: torch.Tensor) -> torch.Tensor:
    """Stretches [windows, RUN] of the flat tensor, without those that prove nothing."""
    flat = tensor.reshape(-1)
    windows = flat[: len(flat) // RUN * RUN].view(-1, RUN)
    num_distinct = 1 + windows.sort(1).values.diff(dim=1).ne(0).sum(1)
    return windows[windows.ne(0).all(1) & (num_distinct >= MIN_DISTINCT)]


def _four_digits(values: "Iterator[float] | list[float]") -> bytes:
    """Numbers at four significant digits, so that rounded text is found too."""
    return np.array([float(f"{value:.3e}") for value in values], dtype="<f8").tobytes()


def _as_text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _views(content: bytes) -> Iterator[bytes]:
    yield content
    if content.startswith(_PNG):
        yield _png_pixels(content)
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


def _png_pixels(content: bytes) -> bytes:
    packed, offset = b"", len(_PNG)
    while offset < len(content):
        length, kind = struct.unpack_from(">I4s", content, offset)
        if kind == b"IDAT":
            packed += content[offset + 8 : offset + 8 + length]
        offset += 12 + length
    return zlib.decompress(packed)
