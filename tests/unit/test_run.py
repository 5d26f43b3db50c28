"""The run folder: what stands under a final name is complete, one process writes, and damage is seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fullrank.errors import FitError, FullrankError, UsageError
from fullrank.run import (
    Run,
    append_json_line,
    file_digest,
    find_run,
    fingerprint,
    list_runs,
    naming_disk_trouble,
    need_record,
    new_folder,
    read_json_lines,
    read_record,
    verify_manifest,
    write_manifest,
    write_record,
    write_text,
)


class Note(BaseModel):
    text: str
    number: float


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync finds the disk full."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


# ---- the lock -------------------------------------------------------------------------------------------------------

_HOLD = """
import sys
from fullrank.run import Run
with Run(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holding(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with another_process_holding(tmp_path / "run") as process:
        with pytest.raises(UsageError) as caught, Run(tmp_path / "run").locked():
            pass
        assert f"{tmp_path / 'run'}: this run is being written by process {process.pid} on " in caught.value.message
        assert caught.value.exit_code == 2


def test_the_lock_vanishes_with_a_killed_process(tmp_path: Path) -> None:
    with another_process_holding(tmp_path / "run") as process:
        process.kill()
        process.wait()
    with Run(tmp_path / "run").locked():
        assert f"process {os.getpid()} " in (tmp_path / "run" / "lock").read_text(encoding="utf-8")


def test_the_lock_is_free_after_the_block_even_when_it_failed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked(), pytest.raises(UsageError), Run(tmp_path / "run").locked():
        pass
    with run.locked():
        pass


def test_a_file_in_the_runs_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    for root in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UsageError, match="a file stands where a folder is needed"), Run(root).locked():
            pass


def test_a_full_disk_while_locking_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: FullFile(real_open(path, *args, **kw)))
    with pytest.raises(FitError, match="the disk is full"), Run(tmp_path / "run").locked():
        pass


# ---- trouble with the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, FitError, 4),
        (errno.EDQUOT, FitError, 4),
        (errno.EACCES, UsageError, 2),
        (errno.EPERM, UsageError, 2),
        (errno.EROFS, UsageError, 2),
    ],
)
def test_refusals_to_write_become_errors_that_say_where(number: int, kind: type[FullrankError], code: int) -> None:
    with pytest.raises(kind) as caught, naming_disk_trouble(Path("here")):
        raise OSError(number, os.strerror(number))
    assert caught.value.message.startswith("here: ")
    assert caught.value.exit_code == code
    assert caught.value.hint


def test_other_trouble_passes_through() -> None:
    with pytest.raises(OSError, match="broken") as caught, naming_disk_trouble(Path("here")):
        raise OSError(errno.EIO, "broken")
    assert type(caught.value) is OSError


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_nothing_partial(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old", encoding="utf-8")
    with pytest.raises(FitError):
        write_text(tmp_path / "a.json", "new")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_folder_and_nothing_partial(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with pytest.raises(FitError), new_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


# ---- files ----------------------------------------------------------------------------------------------------------


def test_text_is_written_below_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "\u00fc\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "\u00fc\n".encode()
    assert names(tmp_path / "a" / "b") == ["c.txt"]


def test_text_replaces_what_was_there_in_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen = []
    real = Path.replace

    def watched(partial: Path, target: Path) -> Path:
        seen.append((path.read_text(encoding="utf-8"), partial.read_text(encoding="utf-8")))
        return real(partial, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_text(path, "new")
    assert seen == [("old", "new")]
    assert path.read_text(encoding="utf-8") == "new"


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    note = Note(text="\u2028 \u00fc", number=0.1 + 0.2)
    write_record(tmp_path / "note.json", note)
    assert read_record(tmp_path / "note.json", Note) == note
    assert need_record(tmp_path / "note.json", Note, "data") == note


@pytest.mark.parametrize("content", [None, "", '{"text": "a", "num', '{"text": "a"}', '{"text": "a", "number": "x"}', "[]"])
def test_a_record_that_is_missing_torn_or_of_another_form_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "note.json").write_text(content, encoding="utf-8")
    assert read_record(tmp_path / "note.json", Note) is None
    with pytest.raises(UsageError, match=r"run `fullrank data RECIPE` first"):
        need_record(tmp_path / "note.json", Note, "data")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-1"
    with new_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x", encoding="utf-8")
        assert not path.exists()
        assert folder.parent == path.parent, "a rename works within one file system only"
    assert (path / "deep" / "file").read_text(encoding="utf-8") == "x"
    assert names(path.parent) == ["step-1"]


def test_a_folder_replaces_the_one_before_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "model") as folder:
            (folder / name).touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_inside_leaves_the_old_folder_and_nothing_partial(tmp_path: Path, failure: type[BaseException]) -> None:
    with new_folder(tmp_path / "model") as folder:
        (folder / "old").touch()
    with pytest.raises(failure), new_folder(tmp_path / "model") as folder:
        (folder / "half").touch()
        raise failure
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "model") as folder:
        (folder / "old").touch()
    real = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if path.name == ".model.partial":
            raise OSError(errno.ENOSPC, "full")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(FitError), new_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_what_a_killed_attempt_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    with new_folder(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["whole"]


def test_everything_in_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.stat().st_ino))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with new_folder(tmp_path / "model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    path = tmp_path / "model"
    renamed = events.index(("rename", path.stat().st_ino))
    for inside in (path, path / "deep", path / "deep" / "file"):
        assert ("fsync", inside.stat().st_ino) in events[:renamed], inside
    assert ("fsync", tmp_path.stat().st_ino) in events[renamed:]


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_json_lines_keep_every_digit_and_every_character(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"loss": 0.1 + 0.2, "text": "\u2028\n"}, {"loss": 5e-324}, {"loss": float("inf")}]
    for row in rows:
        append_json_line(tmp_path / "deep" / "steps.jsonl", row)
    assert read_json_lines(tmp_path / "deep" / "steps.jsonl") == rows


def test_no_file_holds_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    whole = json.dumps({"step": 2, "text": "\u00fc"}, ensure_ascii=False).encode()
    for end in range(len(whole)):
        path.write_bytes(b'{"step": 1}\n' + whole[:end])
        assert read_json_lines(path) == [{"step": 1}]


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_json_line(path, {"step": 2})
    append_json_line(path, {"step": 3})
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 3]


# ---- fingerprints and manifests -------------------------------------------------------------------------------------


def test_fingerprints_follow_what_they_are_of() -> None:
    assert fingerprint({"a": 1, "b": [2]}, "x") == fingerprint({"b": [2], "a": 1}, "x")
    others = [("a", "b"), ("ab",), (["a", "b"],), ("a", "b", None), (1,), ("1",), (1.5,), ({"a": "b"},)]
    assert len({fingerprint(*parts) for parts in others}) == len(others)


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the test vector of FIPS 180-2
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / "deep" / "config").write_bytes(b"{}")
    write_manifest(folder)
    return folder


def test_an_untouched_folder_is_as_its_manifest_says(sealed: Path) -> None:
    assert verify_manifest(sealed) is None
    shutil.copytree(sealed, sealed.parent / "copy")
    assert verify_manifest(sealed.parent / "copy") is None


@pytest.mark.parametrize("position", [0, 100, 255])
def test_a_flipped_bit_is_found(sealed: Path, position: int) -> None:
    content = bytearray((sealed / "weights").read_bytes())
    content[position] ^= 1
    (sealed / "weights").write_bytes(content)
    assert verify_manifest(sealed) == "weights differs from its manifest"


def test_missing_and_shortened_files_are_found(sealed: Path) -> None:
    (sealed / "weights").write_bytes(b"")
    assert verify_manifest(sealed) == "weights differs from its manifest"
    (sealed / "deep" / "config").unlink()
    assert verify_manifest(sealed) == "deep/config is missing"
    (sealed / "MANIFEST.json").unlink()
    assert verify_manifest(sealed) == "it has no readable MANIFEST.json"


def test_a_damaged_manifest_never_passes_and_never_breaks(sealed: Path) -> None:
    path = sealed / "MANIFEST.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            is_harmless = json.loads(damaged) == meaning  # a flipped space may be white space still
        except ValueError:
            is_harmless = False
        assert (verify_manifest(sealed) is None) == is_harmless, position
    for damage in (whole[: len(whole) // 2], b"[]", b'{"files": []}', b'{"files": {"weights": 3}}', b"\xff"):
        path.write_bytes(damage)
        assert verify_manifest(sealed) == "it has no readable MANIFEST.json"


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_events_reach_the_file_and_the_listener(tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    run = Run(tmp_path / "run", listener=lambda event, facts: heard.append((event, facts)))
    run.tell("started", stage="data")
    run.show("step", loss=1.0)
    assert heard == [("started", {"stage": "data"}), ("step", {"loss": 1.0})]
    [row] = read_json_lines(tmp_path / "run" / "events.jsonl")
    assert (row["event"], row["stage"]) == ("started", "data")


def test_runs_are_listed_oldest_first_and_found_by_name_or_path(tmp_path: Path) -> None:
    for age, name in ((2, "b"), (1, "a")):
        write_text(tmp_path / name / "recipe.yaml", "")
        os.utime(tmp_path / name / "recipe.yaml", (1000 - age, 1000 - age))
    (tmp_path / "no-run").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == ["b", "a"]
    assert list_runs(tmp_path / "gone") == []
    assert find_run("a", tmp_path).root == find_run(str(tmp_path / "a"), tmp_path / "gone").root == tmp_path / "a"
    with pytest.raises(UsageError, match=r"no run 'no-run' .*\(runs there: b, a\)"):
        find_run("no-run", tmp_path)


def test_the_hallway_is_entered_without_torch() -> None:
    code = "import sys, fullrank.loading, fullrank.run, fullrank.records; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
