"""Quantities as people read and write them: bytes, seconds and counts, parsed and printed in one place.

Internally every quantity is a plain number whose unit stands in its name (`_bytes`, `_seconds`, `_tokens`).
"""

from __future__ import annotations

import re

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes from `8GB` (10^9), `8GiB` (2^30), `512MB` or a plain number.

    Raises:
        ValueError: when the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(text), re.IGNORECASE)
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a size; write a number of bytes, or a number with KB, MB, GB, KiB, MiB, GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """`4.31 GB`, `512 MB`, `12 B`: decimal units, three digits."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: int) -> str:
    """`1,234`, `44.1k`, `134.5M`, `7.2B`: exact below ten thousand, then four digits."""
    if abs(count) < 10_000:
        return f"{count:,}"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(count) >= 0.99995 * size:  # 999,999 is 1.0M, not 1000.0k
            return f"{count / size:.1f}{unit}"
    raise AssertionError("unreachable: counts of ten thousand and more have a unit")


def plural(count: int, noun: str) -> str:
    """`1 file`, `2 files`: a count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
