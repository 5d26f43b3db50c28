"""Seconds and peak memory of a stretch of work, measured from the outside by sampling the process.

The peak is the largest resident set seen by a thread that looks every few milliseconds: allocations that come and go between
two looks are missed, which matters to no tensor that is worth counting.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


class Meter:
    """`with Meter() as meter: ...` then `meter.seconds` and `meter.peak_bytes`."""

    interval_seconds = 0.01

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._started = 0.0
        self._seconds: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """Wall time since the start, or of the whole stretch once it has ended."""
        return self._seconds if self._seconds is not None else time.monotonic() - self._started

    def __enter__(self) -> Meter:
        self._started = time.monotonic()
        self.peak_bytes = resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._seconds = time.monotonic() - self._started
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(self.interval_seconds):
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
