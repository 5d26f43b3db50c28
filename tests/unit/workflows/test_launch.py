"""The line to the ranks, without ranks: a socket in this process stands for one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fullrank.errors import FullrankError, Stopped
from fullrank.run import Run
from fullrank.workflows import launch


@pytest.fixture
def line(tmp_path: Path) -> Iterator[launch._Line]:
    with launch._Line(tmp_path / "socket", Run(tmp_path / "run")) as line:
        yield line


@pytest.fixture
def rank() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as rank:
        rank.settimeout(20.0)
        yield rank


def test_a_rank_that_is_still_starting_hears_of_a_stop(line: launch._Line, rank: socket.socket) -> None:
    signal.raise_signal(signal.SIGINT)
    rank.connect(str(line.path))
    assert rank.recv(64) == b"stop\n"


def test_a_second_stop_interrupts(line: launch._Line) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("asked", "code", "kind", "words"),
    [
        (True, -signal.SIGTERM, Stopped, "before the first step or after the last"),
        (False, -signal.SIGTERM, FullrankError, "rank 1 (process 7) was ended by signal 15"),
        (True, -signal.SIGKILL, FullrankError, "rank 1 (process 7) was ended by signal 9"),
        (False, 3, FullrankError, "rank 1 (process 7) ended with exit code 3"),
    ],
)
def test_ranks_that_end_without_a_word(asked: bool, code: int, kind: type[FullrankError], words: str, tmp_path: Path) -> None:
    failed: Any = SimpleNamespace(get_first_failure=lambda: (1, SimpleNamespace(exitcode=code, pid=7)))
    found = launch._unexplained(failed, Run(tmp_path), asked=asked)
    assert type(found) is kind and words in found.message
