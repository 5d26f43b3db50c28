"""While training, freed memory stays and garbage waits; afterwards everything is as it was."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys

import pytest

from fullrank.parallel.quiet import are_long, between_steps, quiet

#: In a process of its own, whose C library always gives large arrays back: left to itself, it depends on what came before.
FIXED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
PROGRAM = """
import json, resource
import torch
from fullrank.parallel.quiet import quiet

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [torch.ones(1 << 20) for _ in range(40)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fewest():
    return min(faults_of_a_step() for _ in range(3))

before = fewest()
with quiet():
    inside = fewest()
print(json.dumps([before, inside, faults_of_a_step()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_freed_memory_is_kept() -> None:
    """A step of arrays of 4 MB, 160 MB in all, made and dropped: pages that the system has to hand out for it."""
    environment = {**os.environ, **FIXED}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    before, inside, after = json.loads(done.stdout)
    pages = 40 * (4 << 20) // 4096
    assert before > pages / 2, "as it is, every step begins with new pages"
    assert inside < pages / 20
    assert after > pages / 2, "at the end it was given back"


HOLES = """
import json, sys
import torch
from fullrank.meter import resident_bytes
from fullrank.parallel.quiet import quiet

def a_pass(blocks):
    kept = []
    for _ in range(blocks):
        inside = [torch.ones(6 << 20) for _ in range(3)]  # 24 MB each, while a block computes
        kept.append(torch.ones(9 << 18))  # 9 MB, what enters the next one
        del inside
    return kept

with quiet(large_apart=sys.argv[1] == "long"):
    before = resident_bytes()
    kept = a_pass(20)
    print(json.dumps((resident_bytes() - before) / sum(one.nbytes for one in kept)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_long_rows_leave_no_holes() -> None:
    """Twenty blocks' inputs take their own room, and not that of what came and went between them."""
    command = [sys.executable, "-c", HOLES, "long"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **FIXED})
    assert json.loads(done.stdout) <= 1.1


def test_rows_are_long_by_what_enters_a_block() -> None:
    assert not are_long(1024, 576) and are_long(4096, 576) and are_long(1024, 4096)


def test_garbage_waits_for_the_end_of_a_step() -> None:
    class Cycle:
        """Reaches itself."""

        alive = 0

        def __init__(self) -> None:
            self.me = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    assert gc.isenabled()
    with quiet():
        for _ in range(5000):
            Cycle()
        assert Cycle.alive == 5000
        between_steps()
        assert Cycle.alive == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_ends_it_as_well() -> None:
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert gc.isenabled()
