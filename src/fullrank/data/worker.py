"""Processes that do tasks for `fullrank.data.pool`: one that makes ready, and its children, which do the work.

What the tasks need (libraries, the tokenizer) is loaded once, by a process that is then copied (fork) as often as there are
workers: pages that nobody writes to are in memory once, so that another worker costs what it works on and little else. Each child
reads tasks from a socket of its own and writes results to it; the first process waits for its children and says how each ended.
It has no threads, which is what makes a copy of it sound.

Both ends are this package's own, on one machine, through sockets that nobody else has: that is why pickle may be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import socket
import sys
import traceback
from typing import Any

from fullrank.errors import FullrankError


def main() -> None:
    """Makes ready for the task on standard input, then works on the sockets named in the arguments until they are closed."""
    sockets = [int(number) for number in sys.argv[1:]]
    try:
        key, task = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the process that wrote here was killed as it wrote
        return
    with contextlib.suppress(Exception):  # it will be told when there is work to do
        task.warm()
    _give_back()
    gc.disable()  # a block is hundreds of thousands of small objects, few of them in cycles: one look at its end is enough
    gc.freeze()  # a look writes to every page that holds an object it knows of
    children: dict[int, int] = {}
    for own in sockets:
        child = os.fork()
        if not child:
            for other in sockets:
                if other != own:
                    os.close(other)
            _serve(own, {key: task})
            os._exit(0)
        children[child] = own
    for number in sockets:
        os.close(number)
    while children:
        child, status = os.wait()
        with contextlib.suppress(BrokenPipeError):  # nobody is left to tell
            print(children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # the usual way out would write once more what nobody reads


def _give_back() -> None:
    """Gives memory that the C library keeps for later back to the system, where it can: loading tokenizers leaves 30 MB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _serve(number: int, tasks: dict[int, Any]) -> None:
    stream = socket.socket(fileno=number).makefile("rwb")
    sys.stdout = sys.stderr  # a library that prints must not spoil what the first process says
    while True:
        try:
            key, task, job = pickle.load(stream)
        except (EOFError, OSError, pickle.UnpicklingError):  # the end, or the process that wrote here was killed as it wrote
            return
        if task is not None:
            tasks[key] = task
        try:
            answer = (False, tasks[key].run(*job))
        except FullrankError as error:
            answer = (True, error)
        except Exception as error:
            words = f"a process that prepares data failed: {type(error).__name__}: {error}"
            answer = (True, FullrankError(words, hint=traceback.format_exc()))
        gc.collect()
        try:
            pickle.dump(answer, stream, protocol=pickle.HIGHEST_PROTOCOL)
            stream.flush()
        except OSError:  # nobody is left to tell; the usual way out would try once more to write
            os._exit(1)


if __name__ == "__main__":
    main()
