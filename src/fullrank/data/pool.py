"""Work in parallel processes, in order, with a bounded amount of it under way.

The processes are lean: they import what a task is made of and nothing else, never torch. They are copies of one that has loaded
what the first task needs, so that it is in memory once (`fullrank.data.worker`). That one is started as a module of this package,
so that no script of a user's is imported a second time; all of them end with the process that started them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

from fullrank.errors import FullrankError

#: What a process that only handles text is spared: torch, threads of its own, words from libraries.
#: (A tokenizer makes and drops a string for every token: a longer list of free memory for each size spares a tenth of its time.)
_LEAN = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=127",
    "USE_TORCH": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Task(Protocol):
    """Something to do many times; it is sent to each process once."""

    def run(self, *arguments: Any) -> Any:
        """Does it with these arguments."""
        ...

    def warm(self) -> None:
        """Loads what it will need, before processes are copied."""
        ...


class Pool:
    """`with Pool(2) as pool: for result in pool.each(task, jobs): ...`

    Args:
        processes: how many; with 0 everything is done in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._threads = ThreadPoolExecutor(max(1, processes), thread_name_prefix="pool")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._family: _Family | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)  # first: what waits would start processes anew
        self.rest()  # a worker that is stopped wakes the thread that waits for it
        self._threads.shutdown(wait=True)
        self.rest()  # those that were just being started

    def rest(self) -> None:
        """Ends the processes, which give their memory back; new ones are started when there is work again."""
        with self._lock:
            family, self._family = self._family, None
        if family:
            family.stop()

    def each(self, task: Task, jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of a task for jobs, in their order; jobs are taken as there is room for them."""
        if not self.processes:
            for job in jobs:
                yield task.run(*job)
            return
        under_way: deque[Future[Any]] = deque()
        for job in jobs:
            under_way.append(self._threads.submit(self._do, task, job))
            # One more than there are processes: the next piece of work is ready when one has done its own.
            if len(under_way) > self.processes + 1:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _do(self, task: Task, job: tuple[Any, ...]) -> Any:
        with self._lock:
            if self._family is None:
                self._family = _Family(self.processes, task)
            worker: _Worker | None = getattr(self._local, "worker", None)
            if worker is None or worker.family is not self._family:
                worker = self._local.worker = self._family.idle.pop()
        return worker.do(task, job)


class _Family:
    """A process and its copies, which work."""

    def __init__(self, count: int, task: Task) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [their.fileno() for _, their in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fullrank.data.worker", *map(str, theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=theirs,
            env={**os.environ, **_LEAN},
            start_new_session=True,  # Ctrl-C at the terminal is the parent's to handle
        )
        self.idle = [_Worker(self, own, their.fileno(), task) for own, their in pairs]
        for _, their in pairs:
            their.close()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # whoever gives it work is told that it has ended
            pickle.dump((id(task), task), self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.close()
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()

    def exit_code(self, number: int) -> int:
        """How the copy with a socket of this number ended."""
        assert self._process.stdout
        with self._lock:
            while number not in self._codes:
                words = self._process.stdout.readline().split()
                if not words:
                    return self._process.wait()
                self._codes[int(words[0])] = int(words[1])
            return self._codes[number]

    def stop(self) -> None:
        """Ends all of them, whatever they are at."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Worker:
    """A process that does one thing at a time."""

    def __init__(self, family: _Family, own: socket.socket, number: int, task: Task) -> None:
        self.family, self._number = family, number
        self._stream = own.makefile("rwb")
        own.close()  # once the stream is
        self._known: dict[int, Task] = {id(task): task}
        """Tasks that were sent; held, so that none is taken for another that came to lie in its place."""

    def do(self, task: Task, job: tuple[Any, ...]) -> Any:
        """The task's result.

        Raises:
            FullrankError: what the task raised, or that the process ended.
        """
        key = id(task)
        message = (key, None if key in self._known else task, job)
        self._known[key] = task
        try:
            pickle.dump(message, self._stream, protocol=pickle.HIGHEST_PROTOCOL)
            self._stream.flush()
            is_error, result = pickle.load(self._stream)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self.family.exit_code(self._number)
            raise FullrankError(
                f"a process that prepares data ended ({'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)})",
                hint="signal 9 is what an exhausted memory looks like: try machine.workers=1; what was prepared is kept",
            ) from None
        if is_error:
            raise result
        return result
