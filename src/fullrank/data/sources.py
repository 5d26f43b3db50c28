"""Where records come from: files of several kinds, plain or compressed, and splits of hub datasets; read in blocks.

    .jsonl .ndjson    one object a line                      .csv .tsv    a header, then one record a row
    .json             one array of objects                   .parquet     one record a row
    .txt              one record, `text`, a file             + .gz .bz2 .xz .zst, Parquet excepted

One process cuts a source into blocks (`blocks`), others take the records out of them (`records`). Promises: every record of a
file is handed out, or is a `Reject` with its place and the reason, and either way counts against the source's `limit`; memory
is bounded by the block and the longest record; blocks follow from the content alone; a file is never modified. What a record
means is not known here: `fullrank.data.convert` says what form it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fullrank.data import hub, parse, rows, tables
from fullrank.data.digests import DigestMemory
from fullrank.data.parse import Origin, RawRecord, Reject, kind_of
from fullrank.data.streams import COMPRESSED, Stream
from fullrank.errors import DataError
from fullrank.loading import matching_files
from fullrank.recipe import Source
from fullrank.run import file_digest, fingerprint

__all__ = [
    "Block",
    "DigestMemory",
    "Origin",
    "RawRecord",
    "Reject",
    "blocks",
    "digest",
    "files",
    "is_seekable",
    "kind_of",
    "pinned",
    "read",
    "read_at",
    "records",
    "size",
    "within",
]


@dataclass(frozen=True)
class Block:
    """What one worker takes at a time; its payload is the same wherever in a file the same records stand."""

    path: str
    """The file, as messages name it; the dataset and split of a hub source."""
    first: int
    """Line of the first byte of the payload, or number of its first record; from 1."""
    offset: int | None
    """Byte of the file (decompressed, where it is compressed) at which the payload begins; None as in `Origin`."""
    payload: bytes
    """Whole lines of the file as they are, or rows as `fullrank.data.rows` writes them."""
    kind: Literal["lines", "rows"]
    seekable: bool
    """Whether `read_at` can read its records again."""
    source_bytes: int
    """Bytes of the source's files that are read once this block is, compressed where they are; 0 for a hub source."""


def blocks(source: Source, *, block_bytes: int = 4 << 20) -> Iterator[Block]:
    """The source in blocks of about `block_bytes`, in order; the first `limit` records of it where a limit is given.

    Raises:
        DataError: a file is missing, of an unknown kind, or cannot be used at all, or there are no records.
        UsageError: a hub dataset without the `hub` extra.
    """
    left, is_empty, before_bytes = source.limit, True, 0
    found: _Counted
    places: list[Path | None] = [None] if source.path is None else [Path(name) for name in files(source)]
    for place in places:
        if place is None:
            found = _row_blocks(hub.rows(source), hub.name(source), block_bytes, left, lambda: 0)
        else:
            found = _file_blocks(place, block_bytes, left)
        with closing(found):
            for block, count in found:
                is_empty = False
                yield replace(block, source_bytes=before_bytes + block.source_bytes)
                left = None if left is None else left - count
        if left == 0:
            return
        before_bytes += _bytes_of(place) if place else 0
    if is_empty:
        named = source.path or hub.name(source)
        raise DataError(f"{named}: holds no records", hint="see the file, or the path in the recipe")


def records(block: Block) -> Iterator[RawRecord | Reject]:
    """What a block holds, in order: every record, or why it could not be read."""
    if block.kind == "rows":
        return rows.decode(block.payload, block.path, block.first, block.offset)
    return parse.json_lines(block.payload, block.path, block.first, block.offset or 0)


def within(block: Block, origin: Origin) -> tuple[int, int]:
    """(line, byte) of a record, counted from its block's first; byte -1 where its file has no such place."""
    byte = -1 if origin.offset is None or block.offset is None else origin.offset - block.offset
    return origin.line - block.first, byte


def read(source: Source) -> Iterator[RawRecord | Reject]:
    """What a source holds, in order; see `blocks`, whose errors it raises."""
    for block in blocks(source):
        yield from records(block)


def is_seekable(path: str) -> bool:
    """Whether single records of a file can be read again: JSON Lines that are not compressed."""
    return _kind(Path(path)) in _LINES


def read_at(path: str, offset: int, line: int = 0) -> RawRecord:
    """One record again, of a file whose blocks are seekable.

    Args:
        path: the file.
        offset: where the record begins, as its origin has it.
        line: its line, for the origin of what is returned; 0 where it is not known.

    Raises:
        DataError: the file cannot be read, or there is no record (any more) at this place.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            raw = file.readline(parse.LONGEST_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}", hint="it was there before; see whether it was moved"
        ) from error
    found = next(parse.json_lines(raw, path, line, offset), None)
    if isinstance(found, RawRecord):
        return found
    reason = found.reason if found else "nothing stands there"
    raise DataError(
        f"{Origin(path, line, offset)}: there is no record here any more: {reason}",
        hint="the file has changed since it was read; run the command again",
    )


def files(source: Source) -> list[str]:
    """The files that a source names, a pattern's in the order of their names; none for a hub source.

    Raises:
        DataError: there is none, or one is missing, no file, or of an unknown kind.
    """
    if source.path is None:
        return []
    found = [Path(name) for name in matching_files(source.path)]
    if not found:
        is_there = Path(source.path).exists()
        problem = "is not a file" if is_there else "no file matches" if set(source.path) & set("*?[") else "no such file"
        raise DataError(f"{source.path}: {problem}", hint="check the path in the recipe")
    wrong = [said for path in found if (said := _problem(path))]
    if wrong:
        raise DataError("\n".join(wrong), hint="convert the file, correct its name, or name the files more closely")
    return [str(path) for path in found]


def size(source: Source) -> int | None:
    """Bytes of all the files of a source, as `Block.source_bytes` counts them; None for a hub source.

    Raises:
        DataError: as `files`.
    """
    return None if source.path is None else sum(_bytes_of(Path(name)) for name in files(source))


def digest(source: Source, known: DigestMemory | None = None) -> str:
    """SHA-256 of what `blocks` reads: kinds and bytes of the files, or a hub dataset's id, split and state; and the limit.

    Args:
        source: the source.
        known: spares reading files that are proven unchanged; to be saved by the caller.

    Raises:
        DataError: a file is missing or cannot be read, or the hub dataset cannot be loaded.
    """
    if source.path is None:
        return hub.digest(source)
    found = []
    for path in map(Path, files(source)):
        try:
            found.append([_kind(path), known.digest(path) if known else file_digest(path)])
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return fingerprint("files", found, source.limit)


def pinned(source: Source) -> Source:
    """The source with the commit that a streamed dataset is at now as its revision, so that all reading sees the same one.

    Raises:
        DataError: the hub cannot be reached, or knows no such dataset or revision.
    """
    return source.model_copy(update={"revision": hub.commit(source)}) if source.streaming else source


# ---- blocks of files ------------------------------------------------------------------------------------------------

_LINES = (".jsonl", ".ndjson")
#: Kinds whose records are parsed where the file is opened: the place of one record depends on all before it.
_READERS: dict[str, Callable[[Stream], Iterator[RawRecord | Reject]]] = {
    ".json": parse.json_array,
    ".csv": lambda stream: tables.csv_rows(stream, ","),
    ".tsv": lambda stream: tables.csv_rows(stream, "\t"),
    ".txt": parse.text_file,
}
_PARQUET = ".parquet"
_KINDS = (*_LINES, *_READERS, _PARQUET)

#: Blocks, each with the number of its records (any number but 0 where there is no limit to count for).
_Counted = Generator[tuple[Block, int], None, None]


def _kind(path: Path) -> str:
    """The suffixes that tell how a file is read: `.jsonl`, `.csv.gz`; not lower case ones count as well."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return before + last if last in COMPRESSED else last


def _problem(path: Path) -> str | None:
    """Why a file's name makes it no data file."""
    kind = _kind(path)
    plain = Path(kind).stem if Path(kind).suffix in COMPRESSED else kind
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return f"{str(path)!r}: the name is not UTF-8"
    if plain not in _KINDS or (plain == _PARQUET and plain != kind):
        found = f"{kind!r} files are not known" if kind else "a data file's name tells its kind"
        compressed = ", ".join(COMPRESSED)
        return f"{path}: {found}; allowed: {', '.join(_KINDS)}, and but for {_PARQUET} compressed as {compressed}"
    return None


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _file_blocks(path: Path, block_bytes: int, limit: int | None) -> _Counted:
    kind = _kind(path)
    plain = Path(kind).stem
    if kind == _PARQUET:
        yield from _row_blocks(tables.parquet_rows(path), str(path), block_bytes, limit, lambda: 0)
        return
    with Stream(path) as stream:
        if plain in _LINES:
            yield from _line_blocks(stream, block_bytes, limit)
        else:
            yield from _row_blocks(_READERS[plain](stream), str(path), block_bytes, limit, lambda: stream.consumed_bytes)


def _line_blocks(stream: Stream, block_bytes: int, limit: int | None) -> _Counted:
    left, is_plain = limit, is_seekable(stream.path)
    for chunk in parse.line_chunks(stream, block_bytes):
        if isinstance(chunk, Reject):
            yield from _row_blocks(iter([chunk]), stream.path, block_bytes, left, lambda: stream.consumed_bytes)
            count = 1
        else:
            line, offset, payload = chunk
            payload, count = _first_lines(payload, left)
            if not count:
                continue
            done_bytes = offset + len(payload) if is_plain else stream.consumed_bytes
            yield Block(stream.path, line, offset, payload, "lines", is_plain, done_bytes), count
        if left is not None:
            left -= count
            if not left:
                return


def _first_lines(payload: bytes, limit: int | None) -> tuple[bytes, int]:
    """The payload up to its `limit`-th line that is not blank, and how many such lines it has (1 for any, without a limit)."""
    if limit is None:
        return payload, int(_NOT_BLANK.search(payload) is not None)
    count = end = 0
    for raw in payload.split(b"\n"):
        end += len(raw) + 1
        count += bool(raw.strip(parse.SPACE))
        if count == limit:
            return payload[:end], count
    return payload, count


_NOT_BLANK = re.compile(rb"[^ \t\r\n]")


def _row_blocks(
    items: Iterator[RawRecord | Reject], path: str, block_bytes: int, limit: int | None, done_bytes: Callable[[], int]
) -> _Counted:
    pieces: list[bytes] = []
    length = first = 0
    offset: int | None = None

    def block() -> Block:
        return Block(path, first, offset, b"[" + b",".join(pieces) + b"]", "rows", False, done_bytes())

    for total, item in enumerate(items, start=1):
        if not pieces:
            first, offset = item.origin.line, item.origin.offset
        pieces.append(rows.encode(item, first, offset))
        length += len(pieces[-1])
        if length >= block_bytes or total == limit:
            yield block(), len(pieces)
            pieces, length = [], 0
        if total == limit:
            return
    if pieces:
        yield block(), len(pieces)
