"""Digests of files, remembered, so that a file that has not changed need not be read again to prove it.

A digest is remembered with the file's size, times of modification and of change, and inode, and holds as long as all four are the
same. Programs can set the modification time back, but not the change time, which the kernel sets at every write, rename and
change of times. One gap remains: clocks of file systems tick coarsely, so that a file written twice within one tick has the same
times twice. Git calls such an entry of its index "racily clean" (its Documentation/technical/racy-git.txt) and reads the file
again; so it is here: a digest counts only if the file had been left alone for `SETTLED_NANOSECONDS` when it was taken.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from fullrank.run import file_digest, write_text

#: 2 seconds: the tick of FAT, the coarsest in use; others tick in milliseconds or less, and network file systems lag some more.
SETTLED_NANOSECONDS = 2_000_000_000

_FORM = 1
_State = tuple[int, int, int, int]


def _state(path: Path) -> _State:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class DigestMemory:
    """SHA-256 digests of files by their absolute paths; `load` makes one, `save` keeps it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[_State, str]] = {}
        self._is_changed = False

    @classmethod
    def load(cls, path: Path) -> DigestMemory:
        """What was saved there; nothing where there is no such file, or one that cannot be used: then files are read again."""
        memory = cls(path)
        try:
            saved = json.loads(path.read_bytes())
            if saved["form"] == _FORM:
                for name, (size, modified, changed, inode, sha256) in saved["files"].items():
                    if all(type(fact) is int for fact in (size, modified, changed, inode)) and isinstance(sha256, str):
                        memory._known[name] = (size, modified, changed, inode), sha256
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            memory._known.clear()
        return memory

    def digest(self, file: Path | str) -> str:
        """SHA-256 of the file's bytes, as a hexadecimal number; read from the file unless it is proven unchanged.

        Raises:
            OSError: the file cannot be read.
        """
        path = Path(file)
        name = str(path.absolute())
        before, now = _state(path), time.time_ns()
        if name in self._known and self._known[name][0] == before:
            return self._known[name][1]
        found = file_digest(path)
        was_settled = max(before[1], before[2]) + SETTLED_NANOSECONDS <= now
        if was_settled and _state(path) == before:
            self._known[name], self._is_changed = (before, found), True
        elif self._known.pop(name, None):
            self._is_changed = True
        return found

    def save(self) -> None:
        """Writes the memory at once, if there is anything new in it; files that are gone are forgotten.

        Raises:
            FitError, UsageError: as `fullrank.run.write_text`.
        """
        if not self._is_changed:
            return
        files = {name: [*state, sha256] for name, (state, sha256) in sorted(self._known.items()) if Path(name).exists()}
        # Runs side by side share the memory: each writes under a name of its own, and the last one's word counts.
        own = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        write_text(own, json.dumps({"form": _FORM, "files": files}, indent=1) + "\n")
        own.replace(self._path)
        self._is_changed = False
