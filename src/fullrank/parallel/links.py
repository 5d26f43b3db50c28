"""How fast ranks of this machine tell one another something: two processes, measured.

    python -m fullrank.parallel.links DEVICE_TYPE

as a rank (see `fullrank.parallel.world.told`) prints what the first one measured. Two ranks are the fewest that can be measured
and the most that every machine has room for; what more of them reach is for a simulation to assume.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import distributed

from fullrank.errors import FullrankError
from fullrank.parallel import device as devices
from fullrank.parallel.world import joined, told

_PATIENCE_SECONDS = 120.0
#: Of the whole that is gathered or summed: a block's weights, and next to nothing.
_LARGE_BYTES, _SMALL_BYTES = 32 << 20, 1 << 10
_TIMES = 5


@dataclass(frozen=True)
class Link:
    """Between two ranks."""

    bytes_per_second: float
    """Each way, in an all-gather followed by a reduce-scatter, as FSDP2 uses both."""
    latency_seconds: float
    """Of a small one."""


def measure(device_type: str) -> Link:
    """Measures with two processes, one thread each.

    Raises:
        FullrankError: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "fullrank.parallel.links", device_type]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=_PATIENCE_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise FullrankError(f"two ranks did not measure their link within {_PATIENCE_SECONDS:.0f} seconds") from None
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise FullrankError(f"a rank that measured the link between two of them failed:\n{errors[-2000:]}")
    return Link(**json.loads(said[0][0].splitlines()[-1]))


def main(device_type: str) -> None:
    """Measures as one of two ranks; the first one prints."""
    world = told()
    assert world is not None and world.size == 2, "started by `measure`"
    with joined(world, device_type, patience_seconds=_PATIENCE_SECONDS):
        device = torch.device(device_type, world.local_rank) if device_type == "cuda" else torch.device(device_type)

        def once(whole_bytes: int) -> float:
            whole = torch.ones(whole_bytes // 4, device=device)
            part = torch.empty(whole.numel() // world.size, device=device)

            def there_and_back() -> None:
                distributed.all_gather_into_tensor(whole, part)
                distributed.reduce_scatter_tensor(part, whole)

            return _fastest(there_and_back, device) / 2

        latency = once(_SMALL_BYTES)
        seconds = max(once(_LARGE_BYTES) - latency, 1e-9)
        if world.is_first:
            sent = (world.size - 1) / world.size * _LARGE_BYTES
            print(json.dumps(asdict(Link(sent / seconds, latency))), flush=True)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_TIMES):
        distributed.barrier()
        devices.synchronize(device)
        started = time.perf_counter()
        work()
        devices.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main(sys.argv[1])
