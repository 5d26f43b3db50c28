"""Ranks that are named: here each is a heartbeat of its own in one process, on a store of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from fullrank.parallel import heartbeat
from fullrank.parallel.heartbeat import Heartbeat
from fullrank.parallel.world import World

RANKS = 4


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    yield


class Rank(Heartbeat):
    """A heartbeat that can stop beating, and remembers what ended it."""

    def __init__(self, rank: int, folder: Path, **options: Any) -> None:
        self.ended: list[str] = []
        super().__init__(World(rank, RANKS, rank, RANKS), folder, self.ended.append, **options)


def wait_for_all(ranks: list[Rank], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(rank.ended for rank in ranks):
        assert time.monotonic() < deadline, [rank.ended for rank in ranks]
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_silent_rank_is_named_on_all_others(victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(number, tmp_path, silence_seconds=0.6) for number in range(RANKS)]
    for rank in ranks:
        rank.at("forward", 7)
        rank.__enter__()
    time.sleep(0.3)
    assert not any(rank.ended for rank in ranks)
    dead = ranks.pop(victim)
    stop = threading.Event()
    monkeypatch.setattr(dead, "_over", _Stopped(stop))
    stop.set()
    wait_for_all(ranks)
    for rank in ranks:
        assert rank.ended[0].startswith(f"rank {victim} has been silent for ") and "in forward of step 7" in rank.ended[0]
        number = rank._world.rank
        assert rank.ended[0] in (tmp_path / f"stacks-{number:04d}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_leaves_by_an_error_is_not_waited_for(victim: int, tmp_path: Path) -> None:
    """The others may be in a collective that waits for it, which NCCL does not notice."""
    ranks = [Rank(number, tmp_path, silence_seconds=0.6) for number in range(RANKS)]
    for rank in ranks:
        rank.at("forward", 7)
        rank.__enter__()
    time.sleep(0.3)
    ranks.pop(victim).__exit__(RuntimeError, RuntimeError("out of memory"), None)
    wait_for_all(ranks)
    assert all(rank.ended[0].startswith(f"rank {victim} has been silent for ") for rank in ranks)


class _Stopped:
    """In place of the event that ends a heartbeat: from some moment on its thread hangs."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        while self._stop.is_set():
            time.sleep(0.1)
        time.sleep(seconds)
        return False

    def set(self) -> None:
        """Is never over."""


def test_of_ranks_that_stand_still_the_one_furthest_behind_is_named(tmp_path: Path) -> None:
    ranks = [Rank(number, tmp_path, silence_seconds=60.0, standstill_seconds=0.5) for number in range(RANKS)]
    for rank in ranks:
        rank.__enter__()
        for phase in ("forward", "backward") if rank is not ranks[2] else ("forward",):
            rank.at(phase, 3)
    wait_for_all(ranks)
    for rank in ranks:
        assert rank.ended[0].startswith("no rank got anywhere for ")
        assert "rank 2 is furthest behind" in rank.ended[0] and "in forward of step 3" in rank.ended[0]


def test_ranks_that_get_somewhere_and_end_are_left_alone(tmp_path: Path) -> None:
    ranks = [Rank(number, tmp_path, silence_seconds=0.6, standstill_seconds=0.4) for number in range(RANKS)]
    for rank in ranks:
        rank.__enter__()
    for step in range(10):  # longer than either patience
        time.sleep(0.1)
        for rank in ranks:
            rank.at("forward", step)
    ranks[3].__exit__()
    for step in range(10):
        time.sleep(0.1)
        ranks[0].at("forward", step)
    for rank in ranks[:3]:
        rank.__exit__()
    assert not any(rank.ended for rank in ranks) and not list(tmp_path.iterdir())


def test_every_rank_asks_for_a_number_of_beats_that_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = distributed.TCPStore.check  # type: ignore[attr-defined]
    monkeypatch.setattr(distributed.TCPStore, "check", lambda store, keys: asked.append(len(keys)) or real(store, keys))  # type: ignore[attr-defined, func-returns-value]
    last = Rank(RANKS - 1, tmp_path)
    with last:
        time.sleep(0.2)
    assert asked and max(asked) == 1
