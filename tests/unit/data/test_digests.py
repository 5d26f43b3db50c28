"""Remembered digests: right after every kind of change, and not taken from memory when the clock could not have told."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from fullrank.data import digests, sources
from fullrank.data.digests import DigestMemory
from fullrank.recipe import Source


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their digest."""
    read: list[Path] = []
    real = digests.file_digest

    def file_digest(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests, "file_digest", file_digest)
    return read


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written in the test were left alone for an hour."""
    real = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: real() + 3600 * 10**9)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path, reads: list[Path], later: None) -> None:
    file = written(tmp_path / "a.jsonl", b"one")
    memory = DigestMemory.load(tmp_path / "memory.json")
    assert [memory.digest(file) for _ in range(3)] == [sha256(b"one")] * 3
    memory.save()
    assert DigestMemory.load(tmp_path / "memory.json").digest(str(file)) == sha256(b"one")
    assert len(reads) == 1


def test_a_file_just_written_is_read_every_time(tmp_path: Path, reads: list[Path]) -> None:
    file = written(tmp_path / "a.jsonl", b"one")
    memory = DigestMemory.load(tmp_path / "memory.json")
    for content in (b"one", b"two", b"six"):
        # Same size, and, on a file system with a coarse clock, the same times.
        file.write_bytes(content)
        assert memory.digest(file) == sha256(content)
    assert len(reads) == 3
    memory.save()
    assert not (tmp_path / "memory.json").exists()


def test_two_seconds_are_enough_and_less_is_not(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "a.jsonl", b"one")
    last = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns)
    memory = DigestMemory.load(tmp_path / "memory.json")
    for waited, times in ((1_999_999_999, 1), (2_000_000_000, 2), (2_000_000_000, 2), (0, 2)):
        monkeypatch.setattr(digests.time, "time_ns", lambda waited=waited: last + waited)
        memory.digest(file)
        assert len(reads) == times


def test_every_change_is_seen(tmp_path: Path, reads: list[Path], later: None) -> None:
    file = written(tmp_path / "a.jsonl", b"one")
    memory = DigestMemory.load(tmp_path / "memory.json")
    memory.digest(file)
    before = file.stat()

    file.write_bytes(b"two")  # the same size, and the time of modification set back: the time of change tells
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert memory.digest(file) == sha256(b"two")

    other = written(tmp_path / "b.jsonl", b"six")  # another file moved to its place
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)
    assert memory.digest(file) == sha256(b"six")

    with file.open("ab") as end:
        end.write(b"!")
    assert memory.digest(file) == sha256(b"six!")
    assert len(reads) == 4


@pytest.mark.parametrize("fact", range(4))
def test_each_of_the_four_facts_counts(tmp_path: Path, reads: list[Path], later: None, fact: int) -> None:
    file = written(tmp_path / "a.jsonl", b"one")
    place = tmp_path / "memory.json"
    memory = DigestMemory.load(place)
    memory.digest(file)
    memory.save()
    saved = json.loads(place.read_text())
    saved["files"][str(file)][fact] += 1
    place.write_text(json.dumps(saved))
    assert DigestMemory.load(place).digest(file) == sha256(b"one")
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.jsonl", b"one")

    def file_digest(path: Path) -> str:
        found = sha256(path.read_bytes())
        path.write_bytes(b"changed")
        return found

    monkeypatch.setattr(digests, "file_digest", file_digest)
    memory = DigestMemory.load(tmp_path / "memory.json")
    memory.digest(file)
    monkeypatch.undo()
    assert memory.digest(file) == sha256(b"changed")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"form": 0}', b'{"form": 1, "files": {"/a": [1, 2]}}', b'{"form": 1, "files": 3}', b"\xff", b"[" * 9999],
)
def test_a_memory_that_cannot_be_used_is_none(tmp_path: Path, later: None, content: bytes) -> None:
    memory = DigestMemory.load(written(tmp_path / "memory.json", content))
    assert memory.digest(written(tmp_path / "a.jsonl", b"one")) == sha256(b"one")
    memory.save()
    assert str(tmp_path / "a.jsonl") in json.loads((tmp_path / "memory.json").read_text())["files"]


def test_files_that_are_gone_are_forgotten(tmp_path: Path, later: None) -> None:
    memory = DigestMemory.load(tmp_path / "memory.json")
    for name in ("a.jsonl", "b.jsonl"):
        memory.digest(written(tmp_path / name, b"one"))
    (tmp_path / "a.jsonl").unlink()
    memory.save()
    assert list(json.loads((tmp_path / "memory.json").read_text())["files"]) == [str(tmp_path / "b.jsonl")]


def test_a_sources_digest_is_the_same_with_a_memory_and_without(tmp_path: Path, reads: list[Path], later: None) -> None:
    for number in range(3):
        written(tmp_path / f"{number}.jsonl", b'{"a": %d}' % number)
    source = Source(path=str(tmp_path / "*.jsonl"))
    memory = DigestMemory.load(tmp_path / "memory.json")
    assert sources.digest(source, memory) == sources.digest(source, memory) == sources.digest(source)
    assert len(reads) == 3
