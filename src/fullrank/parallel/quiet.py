"""A process with nothing in the way of its steps: memory that a step frees is there for the next, and no garbage is looked for.

A step makes and drops arrays of hundreds of megabytes. The C library gives such arrays back to the system at once and the
system hands the next step zeroed pages, fault by fault: a fifth of a step of a small model (docs/LOG.md). While training, freed
memory is kept. Python looks for cycles at moments of its own; while training it looks between steps only.

With long rows that is another matter: what is kept of a block, dozens of megabytes, is cut out of what larger arrays left, and
what remains of those fits nothing. Such holes came to as much as all else together (docs/LOG.md), so large arrays then have
mappings of their own, which the system takes back; a row that long has so much to compute that new pages cost it a few hundredths
of its time. So it is with ranks, which gather a block's weights and let go of them all the time: their holes were as large as
what they hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# Of glibc's malloc.h, with the values it starts with.
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 128 * 1024
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 128 * 1024
_M_MMAP_MAX, _MAPPINGS = -4, 65536

#: Arrays as large as this have mappings of their own where rows are long.
LARGE_BYTES = 4 << 20


def are_long(row_tokens: int, hidden_size: int) -> bool:
    """Whether rows are so long that what is kept of a block, T x h numbers of fp32, is a large array."""
    return 4 * row_tokens * hidden_size >= LARGE_BYTES


@contextlib.contextmanager
def quiet(*, large_apart: bool = False) -> Iterator[None]:
    """Inside, memory that is freed stays with the process and garbage is collected by `between_steps` alone.

    Args:
        large_apart: large arrays have mappings of their own and are given back: for rows that `are_long`, and for ranks.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    if large_apart:
        _set(_M_MMAP_THRESHOLD, LARGE_BYTES)
    else:
        _set(_M_MMAP_MAX, 0)
    _set(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _set(_M_MMAP_MAX, _MAPPINGS)
        _set(_M_MMAP_THRESHOLD, _MMAP_BYTES)
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
