"""Processes that are ranks of one world, kept between tests: starting them takes seconds, asking them something does not.

What they are asked are functions of modules that a new process can import (`rank_work`), called as `function(world, *arguments)`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

#: Longest wait for an answer.
PATIENCE_SECONDS = 300.0


class Ranks:
    """`size` ranks on this machine; one that fails or does not answer ends all of them, and the next question starts new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._lines: list[Any] = []

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank answers, by rank."""
        if not self._processes:
            self._start()
        for line in self._lines:
            line.send((function, arguments))
        answers, problems = [], []
        for rank, line in enumerate(self._lines):
            if not line.poll(5.0 if problems else PATIENCE_SECONDS):
                problems.append(f"rank {rank} does not answer")
                continue
            good, answer = line.recv()
            (answers if good else problems).append(answer)
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = tempfile.mktemp(prefix="fullrank-ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            self._lines.append(ours)
            self._processes.append(context.Process(target=_serve, args=(rank, self.size, meeting, theirs), daemon=True))
            self._processes[-1].start()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._lines = [], []


def _serve(rank: int, size: int, meeting: str, line: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import datetime
    import gc

    import torch
    from torch import distributed

    from fullrank.parallel.world import World

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=120)
    )
    world = World(rank, size, rank, size)
    while True:
        try:
            function, arguments = line.recv()
        except EOFError:
            os._exit(0)
        try:
            line.send((True, function(world, *arguments)))
        except BaseException:
            line.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        gc.collect()
