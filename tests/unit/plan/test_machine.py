"""The machine as a plan sees it."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from fullrank.errors import UsageError
from fullrank.plan.machine import USABLE_SHARE, look
from fullrank.recipe import Machine

Usage = namedtuple("Usage", "total used free")


def test_the_facts_are_this_machine_s(tmp_path: Path) -> None:
    found = look(Machine(device="cpu"), tmp_path)
    assert found.device == "cpu" and found.device_name
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.threads == torch.get_num_threads()
    assert 1 <= found.cores <= (os.cpu_count() or 1)


def test_nine_tenths_of_what_is_free_or_ours_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fullrank.plan import machine

    monkeypatch.setattr(machine.devices, "memory_bytes", lambda device: (10_000, 4_000_000_000))
    own = psutil.Process().memory_info().rss
    usable = look(Machine(device="cpu"), tmp_path).memory_available_bytes
    # the process is counted in the ledger, so what it holds already is not taken off twice; its size moves a little meanwhile
    assert usable == pytest.approx(USABLE_SHARE * (4_000_000_000 + own), rel=0.02)


def test_a_limit_is_taken_as_it_is(tmp_path: Path) -> None:
    assert look(Machine(device="cpu", memory_limit="2GiB"), tmp_path).memory_available_bytes == 2 * 2**30


def test_the_disk_is_the_one_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(100, 58, 42)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert look(Machine(device="cpu"), tmp_path / "runs" / "mine").disk_free_bytes == 42
    assert asked == [tmp_path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cuda is not available here"):
        look(Machine(device="cuda"), tmp_path)
