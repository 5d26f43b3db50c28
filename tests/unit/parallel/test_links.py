"""The link between two ranks, measured between two processes."""

from __future__ import annotations

import pytest

from fullrank.errors import FullrankError
from fullrank.parallel import links


def test_two_processes_measure_their_link() -> None:
    found = links.measure("cpu")
    assert 1e6 < found.bytes_per_second < 1e12 and 1e-6 < found.latency_seconds < 1


def test_a_rank_that_fails_is_told() -> None:
    with pytest.raises(FullrankError, match="a rank that measured the link"):
        links.measure("no-device")
