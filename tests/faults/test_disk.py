"""Disks that are full and folders that cannot be written: one clear message, and nothing half-written under a final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from staging import Staged, fresh_here, leftovers, staged, write_case

from fullrank.errors import FitError, UsageError
from fullrank.models import export
from fullrank.plan import speed
from fullrank.run import Run, verify_manifest, write_text
from fullrank.sequences.store import TokenStore
from fullrank.train import checkpoint, proof

DRIVER = Path(__file__).with_name("driver.py")


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    return write_case(tmp_path, tiny_model_folder("llama"), rows=8, train={"epochs": 1, "evaluate_every_steps": 1})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing of blocks, and the export's fresh load in this process."""
    monkeypatch.setattr(export, "fresh_process", fresh_here)
    monkeypatch.setattr(speed, "measure", lambda *arguments, **options: None)


def through(run: Staged) -> None:
    with run.run.locked():
        run.data()
        run.plan()
        run.train()


def everything_is_whole(run: Run) -> None:
    """What stands under a final name can be read, and nothing stands under a provisional one."""
    assert leftovers(run.root) == []
    for path in run.root.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    if run.data.exists():
        assert len(TokenStore(run.data / "train")) == 8
    for folder in [run.model, *run.train.glob("checkpoints/step-*")]:
        if folder.exists():
            assert verify_manifest(folder) is None


def fsyncs(monkeypatch: pytest.MonkeyPatch, fail_at: int | None, number: int = errno.ENOSPC) -> Iterator[int]:
    """Counts fsyncs from 1; the one given fails as a full disk does. Yields the count so far."""
    count = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fail_at:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    while True:
        yield count


def test_a_disk_that_fills_at_any_moment_leaves_only_what_is_whole(case: Path) -> None:
    """The disk is full at each third of the moments at which something reaches it; each time the run is then typed again."""
    with pytest.MonkeyPatch.context() as patch:
        counter = fsyncs(patch, None)
        next(counter)
        whole = staged(case, runs=case.parent / "whole")
        through(whole)
        moments = next(counter)
    assert moments > 30
    expected = (whole.run.model / "model.safetensors").read_bytes()
    for moment in range(1, moments + 1, 3):
        run = staged(case, runs=case.parent / f"full-{moment}")
        with pytest.MonkeyPatch.context() as patch:
            next(fsyncs(patch, moment))
            with pytest.raises(FitError, match="the disk is full") as caught:
                through(run)
        assert caught.value.exit_code == 4 and "the same command" in caught.value.hint
        everything_is_whole(run.run)
        again = staged(case, runs=case.parent / f"full-{moment}")
        through(again)
        assert (again.run.model / "model.safetensors").read_bytes() == expected, moment


@pytest.mark.parametrize("where", ["checkpoint", "best", "export"])
def test_a_disk_that_fills_while_weights_are_written(case: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors, written in Rust, reports the full disk by an error of its own."""

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = staged(case)
    run.data()
    run.plan()
    if where == "export":
        monkeypatch.setattr(proof.export, "write_model", full)
    elif where == "best":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(checkpoint, "save_weights", lambda *arguments: None)
        monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FitError, match="the disk is full"):
        run.train()
    assert not run.run.model.exists()
    everything_is_whole(run.run)


def test_a_line_that_does_not_fit(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "events.jsonl").symlink_to(full)
    with pytest.raises(FitError, match="the disk is full"):
        Run(tmp_path).tell("started", stage="data")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_may_not_be_written(number: int, case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(fsyncs(monkeypatch, 1, number))
    run = staged(case)
    with pytest.raises(UsageError, match="no permission to write here") as caught:
        run.data()
    assert caught.value.exit_code == 2 and "--runs-dir" in caught.value.hint
    assert not run.run.data.exists() and leftovers(run.run.root) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(UsageError, match="no permission to write here"):
        write_text(closed / "below" / "a.txt", "words")


def test_a_file_where_a_folder_is_needed(case: Path) -> None:
    (case.parent / "taken").write_text("not a folder", encoding="utf-8")
    with pytest.raises(UsageError, match="a file stands where a folder is needed"):
        through(staged(case, runs=case.parent / "taken"))
    assert (case.parent / "taken").read_text(encoding="utf-8") == "not a folder"


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def test_a_real_disk_that_is_full(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    """A file system of a few hundred kilobytes: room for the tokens, none for a checkpoint."""
    if not _may_mount():
        pytest.skip("this system lets nobody mount a small file system (unshare -rm)")
    case = write_case(tmp_path, tiny_model_folder("llama"), rows=8, train={"epochs": 1})
    runs = tmp_path / "runs"
    runs.mkdir()
    script = 'mount -t tmpfs -o size=300k tmpfs "$1" && "$2" "$3" train "$4" --runs-dir "$1"; rc=$?; find "$1" >&2; exit $rc'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(runs), sys.executable, str(DRIVER), str(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"ROOMY_DISK": "1"})
    assert done.returncode == 4, done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert f"{runs}/tiny/data/card.json" in done.stderr  # what was complete stays
    assert f"{runs}/tiny/model" not in done.stderr.splitlines() and ".partial" not in done.stderr
