"""A file's bytes from its beginning, decompressed where its name says so (.gz, .bz2, .xz, .zst).

Promises: a file is opened for reading only; memory does not grow with the file, nor with how well it compresses; every member
of a file of several compressed ones is read, and whatever follows them that is not compressed data is a break, not ignored;
where the compressed data break, what could be decompressed before is handed out first.
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from fullrank.errors import DataError

BOM = b"\xef\xbb\xbf"

#: First bytes of a text file that tell how it is encoded.
HEAD_BYTES = 8

#: Compressed bytes read at a time, and most that they may become at once: a few bytes can stand for gigabytes.
_STEP_BYTES = 1 << 16
#: Arrow loses what it decompressed in the call that meets a break: small calls lose little.
_ARROW_STEP_BYTES = 1 << 13
#: Memory an .xz file may ask for; `xz -9` needs 65 MiB.
_XZ_MEMORY_BYTES = 256 << 20


class Stream:
    """The bytes of one file, in order.

    Args:
        path: the file; its last suffix tells the compression.

    Raises:
        DataError: it cannot be opened or read, or holds no compressed data of the kind its name says.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.at_end = False
        """Whether there is nothing more to read; known once a read came back short."""
        self.broken = ""
        """How the compressed data break, where reading ended at a break."""
        self._is_begun = False
        self._rest = b""
        try:
            self._raw = path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        self._format, opened = _COMPRESSIONS.get(path.suffix.lower(), ("", None))
        self._pieces = opened(self._raw) if opened else None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._raw.close()

    @property
    def consumed_bytes(self) -> int:
        """Bytes of the file read so far, compressed where it is."""
        return self._raw.tell()

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end and before a break only."""
        pieces, missing = [], count
        while missing > 0 and not self.at_end:
            piece = self._next(missing)
            self.at_end = not piece
            pieces.append(piece[:missing])
            self._rest = piece[missing:]
            missing -= len(piece)
        return b"".join(pieces)

    def _next(self, most: int) -> bytes:
        if self._rest:
            return self._rest
        try:
            piece = self._raw.read(most) if self._pieces is None else next(self._pieces, b"")
            self._is_begun = True
            return piece
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's trouble, not the data's
                raise _unreadable(self.path, error) from error
            if not self._is_begun:
                raise DataError(
                    f"{self.path}: cannot be decompressed: not {self._format} data, or broken from the start ({error})",
                    hint="check the file, or name it as what it is",
                ) from error
            # A checksum comes after what it is over: that was handed out before anybody could know.
            self.broken = f"the {self._format} data break here ({error}), and what stands before may be wrong"
            return b""


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}", hint="check the file and its permissions")


def refuse_wide_encoding(head: bytes, path: str) -> None:
    """Refuses a text file in UTF-16 or UTF-32 by its first bytes: all of it would be wrong, line after line.

    They are told by a byte order mark or, as RFC 4627 (section 3) does, by where the zero bytes stand among the first eight.

    Raises:
        DataError: naming the encoding.
    """
    marks = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    zeros = "".join("0" if byte == 0 else "x" for byte in head[:HEAD_BYTES])
    patterns = {"x0x0x0x0": "UTF-16", "0x0x0x0x": "UTF-16", "x000x000": "UTF-32", "000x000x": "UTF-32"}
    found = next((name for mark, name in marks.items() if head.startswith(mark)), None) or patterns.get(zeros)
    if found:
        raise DataError(
            f"{path}: is {found} text; text files are read as UTF-8", hint=f"convert it: iconv -f {found} -t UTF-8 OLD > NEW"
        )


# ---- compression ----------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    """What the decompressors of bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gunzip:
    """zlib's decompressor with the manners of the others; it checks gzip's header and checksum."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _members(new: Callable[[], _Decompressor]) -> Callable[[BinaryIO], Iterator[bytes]]:
    """A reader of all compressed members of a file, one after the other.

    The file objects of the standard library will not do: those of bz2 and lzma ignore a damaged second member as rubbish.
    """

    def pieces(raw: BinaryIO) -> Iterator[bytes]:
        data = raw.read(_STEP_BYTES)
        while data:
            member = new()
            while not member.eof:
                piece = member.decompress(data, _STEP_BYTES)
                if piece:
                    yield piece
                data = raw.read(_STEP_BYTES) if member.needs_input and not member.eof else b""
                if member.needs_input and not (member.eof or piece or data):
                    raise EOFError("they end before their end mark")
            data = member.unused_data.lstrip(b"\0")  # zeros may fill up the last block of a tape or disk
            while not data and (more := raw.read(_STEP_BYTES)):
                data = more.lstrip(b"\0")

    return pieces


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    import pyarrow

    own = os.fdopen(os.dup(raw.fileno()), "rb", buffering=0)  # Arrow closes what it is given; both share one position
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(own, mode="r"), "zstd")
    while piece := stream.read(_ARROW_STEP_BYTES):
        yield piece


_COMPRESSIONS: dict[str, tuple[str, Callable[[BinaryIO], Iterator[bytes]]]] = {
    ".gz": ("gzip", _members(_Gunzip)),
    ".bz2": ("bzip2", _members(bz2.BZ2Decompressor)),
    ".xz": ("xz", _members(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY_BYTES))),
    ".zst": ("zstd", _zstd),
}
COMPRESSED = tuple(_COMPRESSIONS)
"""Suffixes of compressed files."""
