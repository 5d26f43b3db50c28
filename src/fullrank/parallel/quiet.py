"""A process with nothing in the way of its steps: memory that a step frees is there for the next, and no garbage is looked for.

A step makes and drops arrays of hundreds of megabytes. The C library gives such arrays back to the system at once and the
system hands the next step zeroed pages, fault by fault: a fifth of a step of a small model (docs/LOG.md). While training, freed
memory is kept. Python looks for cycles at moments of its own; while training it looks between steps only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# Of glibc's malloc.h, with the values it starts with.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 128 * 1024
_M_MMAP_MAX, _MAPPINGS = -4, 65536


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, memory that is freed stays with the process and garbage is collected by `between_steps` alone."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _set(_M_MMAP_MAX, _MAPPINGS)
        _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        gc.unfreeze()
        if was_enabled:
            gc.enable()
        gc.collect()
        give_back()


def between_steps() -> None:
    """Looks for garbage that is in cycles, among what was made since the last look."""
    gc.collect(0)


def _set(option: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(option, value)


def give_back() -> None:
    """Hands freed memory back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
