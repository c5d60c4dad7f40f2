"""The content of a file: unpacked, and as text whatever its encoding."""

import codecs
import gzip
import zlib
from pathlib import Path

from pfm_llm.base.errors import DataError

PARQUET = b"PAR1"
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_SAMPLE = 4000
_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def read_content(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is gzipped.

    Raises:
        DataError: The file is missing, a folder, an archive, or damaged.
    """
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {state}; check data.source and data.items")
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get the file again") from error
    if content.startswith(_ZIP):
        raise DataError(
            f"{path} is a ZIP archive or a spreadsheet; unpack it, or save the sheet as CSV"
        )
    return content


def decode(path: Path, content: bytes, asked: str | None = None) -> tuple[str, str]:
    """Text, and the name of its encoding.

    An encoding that is ``asked`` for is taken. Without one UTF-8 is tried first, UTF-16 is known
    by its zeros, and what is neither is Latin-1, in the Windows edition where bytes ask for it.

    Raises:
        DataError: The file is UTF-8 but for some damaged bytes, not in the encoding that was
            asked for, or no text at all.
    """
    # Without a mark, UTF-16 has two orders of bytes, which the content tells.
    if asked is not None and codecs.lookup(asked).name != "utf-16":
        try:
            return content.decode(asked).removeprefix(_MARK), asked
        except ValueError as error:
            raise DataError(
                f"{path} cannot be read in the encoding {asked} ({error}); change "
                "data.reading.encoding, or leave it out to have it inferred"
            ) from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _decoded(path, content, "utf-16"), "UTF-16"
    sample = content[:_SAMPLE]
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = sample[start::2]
        if half and half.count(0) > len(half) / 2 and sample[1 - start :: 2].count(0) == 0:
            return _decoded(path, content, encoding), "UTF-16"
    if 0 in sample:
        raise DataError(f"{path} is no text file; a table is CSV, TSV, JSON or Parquet")
    try:
        return content.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        # A file with more letters of UTF-8 than faults is not Latin-1 but damaged.
        lenient = content.decode("utf-8", errors="replace")
        num_faults = lenient.count("\N{REPLACEMENT CHARACTER}")
        if sum(not character.isascii() for character in lenient) > 2 * num_faults:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{path} line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
            ) from error
    if any(0x80 <= byte < 0xA0 for byte in set(content)):
        try:
            return content.decode("cp1252"), "Windows-1252"
        except UnicodeDecodeError:
            pass
    return content.decode("latin-1"), "Latin-1"


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding).removeprefix(_MARK)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged UTF-16 ({error.reason}); save it as UTF-8") from error
