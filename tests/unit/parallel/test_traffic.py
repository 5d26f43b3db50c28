"""Seconds of computing and of telling other ranks, from when each began and ended."""

from __future__ import annotations

import time

import pytest
import torch

from fullrank.parallel import traffic


def test_what_overlaps_counts_once() -> None:
    computing = [(0.0, 1.0), (0.5, 2.0), (0.6, 0.7), (5.0, 6.0)]
    communicating = [(1.5, 3.0), (2.5, 3.5), (5.2, 5.4), (8.0, 9.0)]
    found = traffic.divided(computing, communicating)
    assert found.computing == pytest.approx(3.0)
    assert found.communicating == pytest.approx(3.2)
    assert found.exposed == pytest.approx(2.5)  # from 2 to 3.5, and from 8 to 9
    assert traffic.divided([], []) == traffic.Traffic(0.0, 0.0, 0.0)


def test_one_process_tells_nobody() -> None:
    found = traffic.watched(torch.device("cpu"), lambda: time.sleep(0.1))
    assert found == traffic.Traffic(0.0, 0.0, 0.0)
