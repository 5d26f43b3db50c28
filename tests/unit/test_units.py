"""Quantities: what is parsed, what is refused, how they are printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.units import format_bytes, format_count, format_seconds, parse_bytes, plural


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("12", 12),
        (12, 12),
        ("12B", 12),
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8gi", 8 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("512MB", 512 * 10**6),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_parsed(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "8GBs", "8,5GB", "1e9", "8 i", "0x10", "8GB 2", ".5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write a number"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (12, "12 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (4_310_000_000, "4.31 GB"),
        (512_000_000, "512 MB"),
        (99_960_000_000, "100 GB"),
        (2.5e12, "2.5 TB"),
        (-1_500_000, "-1.5 MB"),
    ],
)
def test_bytes_are_printed_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(min_value=0, max_value=10**15))
def test_printed_bytes_are_parsed_back_to_within_three_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_seconds_are_printed_in_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1234, "1,234"),
        (9999, "9,999"),
        (10_000, "10.0k"),
        (44_123, "44.1k"),
        (134_515_008, "134.5M"),
        (7_200_000_000, "7.2B"),
        (-20_000, "-20.0k"),
    ],
)
def test_counts_are_exact_below_ten_thousand(count: int, text: str) -> None:
    assert format_count(count) == text


def test_nouns_follow_their_count() -> None:
    assert [plural(n, "file") for n in (0, 1, 2, 1500)] == ["0 files", "1 file", "2 files", "1,500 files"]
