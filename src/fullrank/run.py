"""The run folder: where things are, how they are written, who may write.

Promises: a file or folder under its final name is complete (written beside, fsynced, renamed); a folder has one writer
at a time, and the lock vanishes with its process; a record is read back as the type it was written as.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fullrank.errors import FitError, UsageError

RecordType = TypeVar("RecordType", bound=BaseModel)
Listener = Callable[[str, dict[str, Any]], None]


class Run:
    """A run's folder.

    Args:
        root: the folder; made when first written to.
        listener: called with every event told to the run (a terminal's progress panel, say); the file has them all anyway.
        tells: False for a process that works on a run of which another one tells: its events go nowhere.
    """

    def __init__(self, root: str | Path, listener: Listener | None = None, *, tells: bool = True) -> None:
        self.root = Path(root)
        self.listener = listener
        self.tells = tells

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def recipe_path(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def plan_path(self) -> Path:
        return self.root / "plan.json"

    @property
    def profile_path(self) -> Path:
        return self.root / "profile.json"

    @property
    def simulation_path(self) -> Path:
        return self.root / "simulation.json"

    @property
    def environment_path(self) -> Path:
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def evaluate(self) -> Path:
        return self.root / "evaluate"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def tell(self, event: str, **facts: Any) -> None:
        """Adds a line to `events.jsonl` and tells the listener."""
        if not self.tells:
            return
        append_json_line(self.root / "events.jsonl", {"time": time.time(), "event": event, **facts})
        self.show(event, **facts)

    def show(self, event: str, **facts: Any) -> None:
        """Tells the listener only: for facts whose home is another file."""
        if self.listener and self.tells:
            self.listener(event, facts)

    @contextmanager
    def locked(self) -> Iterator[Run]:
        """Holds the folder for this process.

        Raises:
            UsageError: when another process writes here, naming it, or the folder cannot be written.
        """
        path = self.root / "lock"
        with naming_disk_trouble(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                owner = handle.read().strip() or "another process"
                raise UsageError(
                    f"{self.root}: this run is being written by {owner}",
                    hint="wait for it, stop it, or give this run another `name`",
                ) from None
            owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            with naming_disk_trouble(self.root):
                handle.truncate(0)
                handle.write(owner)
                handle.flush()
            try:
                yield self
            finally:
                handle.truncate(0)
        finally:
            handle.close()


@contextmanager
def naming_disk_trouble(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into errors that say where and what to do.

    Raises:
        FitError: the disk is full.
        UsageError: no permission, or a read-only file system.
    """
    try:
        yield
    except Exception as error:
        # safetensors writes in Rust and tells the operating system's number only in its words: "... (os error 28)"
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise FitError(
                f"{path}: the disk is full; nothing half-written was left under a final name",
                hint="free some space and type the same command: it continues from what is complete",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{path}: no permission to write here", hint="choose another place with --runs-dir") from error
        if number in (errno.ENOTDIR, errno.EEXIST) and not path.is_dir():
            raise UsageError(
                f"{path}: a file stands where a folder is needed", hint="choose another place with --runs-dir"
            ) from error
        raise


# ---- writing --------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a file under its final name in one rename, after it has reached the disk."""
    with naming_disk_trouble(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        fsync(path.parent)


def write_record(path: Path, record: BaseModel) -> None:
    """Writes a record as indented JSON."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path, record: type[RecordType]) -> RecordType | None:
    """The record, or None where there is none or an older version wrote it in another form."""
    try:
        return record.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def need_record(path: Path, record: type[RecordType], stage: str) -> RecordType:
    """The record that an earlier stage must have left.

    Raises:
        UsageError: naming the stage to run first.
    """
    found = read_record(path, record)
    if found is None:
        raise UsageError(
            f"{path}: not there yet", hint=f"run `fullrank {stage} RECIPE` first, or `fullrank run RECIPE` for all stages"
        )
    return found


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its final name only when the block ended well and every file has reached the disk.

    What stood under the name before is replaced; what a failed attempt left is removed.
    """
    partial, old = partial_of(path), path.with_name(f".{path.name}.old")
    with naming_disk_trouble(path):
        if old.exists() and not path.exists():  # a process was killed between the two renames below
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in [*sorted(partial.rglob("*")), partial]:
                fsync(file)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                try:
                    partial.rename(path)
                except BaseException:
                    old.rename(path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(path)
            fsync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_of(path: Path) -> Path:
    """Where a folder is until it is complete."""
    return path.with_name(f".{path.name}.partial")


def fsync(path: Path) -> None:
    """Brings a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, facts: dict[str, Any]) -> None:
    """Appends one JSON line; numbers keep full precision. A last line torn by a crash stays a line of its own."""
    line = json.dumps(facts, ensure_ascii=False, allow_nan=True).encode() + b"\n"
    with naming_disk_trouble(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


# ---- fingerprints and manifests -------------------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of the parts."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]] = {}) -> None:
    """Writes MANIFEST.json: the size and SHA-256 of every other file of the folder.

    Args:
        folder: whose files are all there.
        known: entries (`manifest_entry`) of files by name that whoever wrote them has made.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.json")
    entries = {name: known.get(name) or manifest_entry(folder / name) for name in (str(p.relative_to(folder)) for p in files)}
    write_text(folder / "MANIFEST.json", json.dumps({"files": entries}, indent=2) + "\n")


def manifest_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def refresh_manifest(folder: Path, name: str) -> None:
    """Brings one file's entry of an existing manifest up to date; the others keep what was proven of them."""
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][name] = manifest_entry(folder / name)
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def verify_manifest(folder: Path, ignoring: Set[str] = frozenset()) -> str | None:
    """None when every file (but those ignored) is as its manifest says; otherwise what is wrong."""
    try:
        entries = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
        stated = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it has no readable MANIFEST.json"
    for name, facts in stated.items():
        if name in ignoring:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (path.stat().st_size, file_digest(path)) != facts:
            return f"{name} differs from its manifest"
    return None


def list_runs(runs_dir: Path) -> list[Run]:
    """The runs below a folder, oldest first."""
    if not runs_dir.is_dir():
        return []
    found = [Run(path.parent) for path in runs_dir.glob("*/recipe.yaml")]
    return sorted(found, key=lambda run: run.recipe_path.stat().st_mtime)


def find_run(name_or_path: str, runs_dir: Path) -> Run:
    """A run by name or by path.

    Raises:
        UsageError: naming the runs there are.
    """
    for root in (Path(name_or_path), runs_dir / name_or_path):
        if (root / "recipe.yaml").is_file():
            return Run(root)
    known = ", ".join(run.name for run in list_runs(runs_dir)) or "none"
    raise UsageError(f"no run {name_or_path!r} in {runs_dir} (runs there: {known})", hint="`fullrank runs` lists them")
