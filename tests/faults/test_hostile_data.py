"""Hostile data files: every record is used as it was written, or refused at its line and byte; none is lost, none crashes."""

from __future__ import annotations

import random
from pathlib import Path

import hostile
import pytest

from fullrank.data import sources
from fullrank.data.sources import RawRecord, Reject
from fullrank.errors import DataError
from fullrank.recipe import Source

PER_CLASS = 140


def is_same(found: object, written: object) -> bool:
    """Equal in value and type all the way down; -0.0 is not 0.0."""
    if type(found) is not type(written):
        return False
    if isinstance(found, dict) and isinstance(written, dict):
        return list(found) == list(written) and all(is_same(found[key], written[key]) for key in written)
    if isinstance(found, list) and isinstance(written, list):
        return len(found) == len(written) and all(map(is_same, found, written))
    return repr(found) == repr(written)


def test_there_are_at_least_5000_cases() -> None:
    assert PER_CLASS * len(hostile.CLASSES) >= 5000


@pytest.mark.parametrize("name", hostile.CLASSES)
def test_every_record_is_accounted_for(name: str, tmp_path: Path) -> None:
    for case in hostile.cases(seed=0, count=PER_CLASS, only=name):
        path = tmp_path / f"{case.name}{case.suffix}"
        path.write_bytes(case.file_bytes)
        before = path.stat()
        # Small blocks, so that records stand at the seams of blocks as well.
        source, found, said = Source(path=str(path)), [], ""
        try:
            for block in sources.blocks(source, block_bytes=64 + len(case.file_bytes) % 100):
                found += sources.records(block)
        except DataError as error:
            said = error.message

        assert (case.refused in said) if case.refused else not said, f"{case.name}: {said!r}"
        assert [(item.origin.line, item.origin.offset) for item in found] == [(e.line, e.offset) for e in case.expected], (
            case.name
        )
        for item, expected in zip(found, case.expected, strict=True):
            assert isinstance(item, Reject if expected.fields is None else RawRecord), f"{case.name}: {item}"
            if isinstance(item, Reject):
                assert item.reason and "\n" not in item.reason and item.reason.encode(), case.name
                assert len(item.reason) < 300, case.name
            else:
                assert is_same(item.fields, expected.fields), f"{case.name}: {item}"
        if sources.is_seekable(str(path)):
            for expected in case.expected:
                if expected.fields is not None:
                    assert is_same(sources.read_at(str(path), expected.offset).fields, expected.fields)

        assert path.read_bytes() == case.file_bytes, f"{case.name}: the file was changed"
        assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
        path.unlink()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_touch_their_own_lines_only(seed: int, tmp_path: Path) -> None:
    """Bytes of a good file are overwritten, cut out, doubled: lines that were not touched are read as they were written."""
    for case in hostile.cases(seed=seed, count=100, only="good"):
        rng = random.Random(case.name)
        lines = case.file_bytes.split(b"\n")
        truth = {expected.line: expected.fields for expected in case.expected}
        begins_with_mark = case.file_bytes.startswith(b"\xef\xbb\xbf")
        touched = set(rng.sample(range(1, len(lines) + 1), rng.randint(0, len(lines)))) | ({1} if begins_with_mark else set())
        for number in touched:
            damaged = bytearray(lines[number - 1])
            for _ in range(rng.randint(1, 3)):
                start = rng.randrange(len(damaged) + 1)
                end = min(len(damaged), start + rng.choice([0, 1, 1, 2, 9]))
                damaged[start:end] = rng.choice([b"", rng.randbytes(end - start), bytes(damaged[start:end]) * 2, b"\0" * 8])
            lines[number - 1] = bytes(damaged).replace(b"\n", b"?")
        path = tmp_path / "damaged.jsonl"
        path.write_bytes(b"\n".join(lines))
        try:
            found = {item.origin.line: item for item in sources.read(Source(path=str(path)))}
        except DataError as error:
            assert "holds no records" in error.message or "text files are read as UTF-8" in error.message
            continue
        blank = b" \t\r" if not lines[0].startswith(b"\xef\xbb\xbf") else b" \t\r\xef\xbb\xbf"
        written = [number for number, line in enumerate(lines, 1) if line.strip(blank if number == 1 else b" \t\r")]
        assert list(found) == written, "lines that are not blank = records + rejects"
        for number in written:
            if number not in touched:
                assert is_same(found[number].fields, truth[number])
