"""A process that does tasks for `fullrank.data.pool`: reads them from standard input, writes results to standard output.

Both ends are this package's own, on one machine, through pipes that nobody else has: that is why pickle may be used.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback
from typing import Any

from fullrank.errors import FullrankError


def main() -> None:
    """Works until standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library that prints must not spoil the results
    tasks: dict[int, Any] = {}
    gc.disable()  # a block is hundreds of thousands of small objects, few of them in cycles: one look at its end is enough
    while True:
        try:
            key, task, job = pickle.load(source)
        except (EOFError, pickle.UnpicklingError):  # the end, or the process that wrote here was killed as it wrote
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
            pickle.dump(answer, sink, protocol=pickle.HIGHEST_PROTOCOL)
            sink.flush()
        except BrokenPipeError:  # nobody is left to tell; the usual way out would try once more to write
            os._exit(1)


if __name__ == "__main__":
    main()
