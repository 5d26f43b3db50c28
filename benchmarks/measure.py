"""A command's time, and the memory of its whole process tree, seen from the outside.

Memory shared between processes (libraries, a fork's pages, mapped files) is counted once by PSS, the proportional set size of
Linux, and as often as there are processes by RSS. Both are sums over all processes that live at the moment of a look; looks are
`LOOK_SECONDS` apart, so that an allocation that comes and goes between two of them is missed.

A measured command may say what it is at: it writes lines of `TIME NAME` (seconds since the epoch) to the file that the
environment variable `BENCHMARK_MARKS` names, and the peaks are told for each stretch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LOOK_SECONDS = 0.2
MARKS = "BENCHMARK_MARKS"


@dataclass
class Look:
    """The memory of a process tree at one moment, in bytes."""

    time: float
    pss: int
    rss: int
    parent_pss: int
    parent_rss: int
    child_pss: int
    """Of the largest child."""
    processes: int


@dataclass
class Measured:
    """A finished command."""

    seconds: float
    code: int
    output: str
    errors: str
    looks: list[Look] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    """(when, what begins), in order."""

    def memory(self, looks: list[Look] | None = None) -> dict[str, int]:
        """Peaks over looks, by default all of them; each by itself, so not all of one moment."""
        looks = self.looks if looks is None else looks
        fields = ("pss", "rss", "parent_pss", "parent_rss", "child_pss", "processes")
        return {f"peak_{name}": max((getattr(look, name) for look in looks), default=0) for name in fields}

    def phases(self) -> dict[str, dict[str, Any]]:
        """Seconds and peaks of each stretch between two marks; stretches of one name are taken together."""
        found: dict[str, dict[str, Any]] = {}
        ends = [when for when, _ in self.marks[1:]] + [self.looks[-1].time if self.looks else 0.0]
        for (begin, name), end in zip(self.marks, ends, strict=True):
            within = self.memory([look for look in self.looks if begin <= look.time < end])
            before = found.get(name, {"seconds": 0.0})
            found[name] = {key: max(before.get(key, 0), value) for key, value in within.items()}
            found[name]["seconds"] = before["seconds"] + end - begin
        return found

    def between(self, begin: str, end: str) -> float:
        """Seconds from the first mark of one name to the first of another."""
        first = {name: when for when, name in reversed(self.marks)}
        return first[end] - first[begin]


def mark(name: str) -> None:
    """Says in a measured command what it is at from now on."""
    if os.environ.get(MARKS):
        with Path(os.environ[MARKS]).open("a", encoding="utf-8") as file:
            file.write(f"{time.time()} {name}\n")


def measure(command: list[str], folder: Path, env: dict[str, str] | None = None, *, looks_on: bool = True) -> Measured:
    """Runs a command in a folder, which takes the file of its marks.

    Args:
        command: program and arguments.
        folder: where it runs.
        env: added to this process's environment.
        looks_on: False leaves its memory alone: a look walks all pages, which takes a core from gigabytes of training for a tenth
            of the time.
    """
    marks = folder / "marks.txt"
    marks.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(env or {}), MARKS: str(marks)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    looks: list[Look] = []

    def watch() -> None:
        tree = psutil.Process(process.pid)
        while looks_on and process.poll() is None:
            looked = time.monotonic()
            if look := _look(tree):
                looks.append(look)
            time.sleep(max(0.0, LOOK_SECONDS - (time.monotonic() - looked)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    lines = marks.read_text(encoding="utf-8").splitlines() if marks.exists() else []
    said = [(float(when), name) for when, _, name in (line.partition(" ") for line in lines)]
    return Measured(seconds, process.returncode, output, errors, looks, said)


def _look(tree: psutil.Process) -> Look | None:
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    found = [_memory(member.pid) for member in members]
    (parent_pss, parent_rss), children = found[0], found[1:]
    return Look(
        time.time(),
        sum(pss for pss, _ in found),
        sum(rss for _, rss in found),
        parent_pss,
        parent_rss,
        max((pss for pss, _ in children), default=0),
        sum(rss > 0 for _, rss in found),
    )


def _memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) of a process in bytes; zeros once it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    sizes = {words[0]: int(words[1]) * 1024 for line in text.splitlines()[1:] if len(words := line.split()) == 3}
    return sizes.get("Pss:", 0), sizes.get("Rss:", 0)


def must(measured: Measured, allowed: tuple[int, ...] = (0,)) -> Measured:
    """The measurement, or the command's own words where it failed."""
    if measured.code not in allowed:
        sys.exit(f"failed with {measured.code}:\n{measured.output[-3000:]}\n{measured.errors[-3000:]}")
    return measured
