"""What the machine offers: device, threads, memory, disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from fullrank.parallel import device as devices
from fullrank.recipe import Machine
from fullrank.records import MachineFacts
from fullrank.units import parse_bytes

#: Share of the free memory that a plan may use: the rest is for what starts meanwhile.
USABLE_SHARE = 0.9


def look(machine: Machine, folder: Path, ranks_here: int = 1) -> MachineFacts:
    """The machine as it is now, for one rank: memory is of its device, or its part of what a CPU's ranks share.

    Args:
        machine: the recipe's machine section, device resolved.
        folder: where the run will be written (its nearest existing parent tells the disk).
        ranks_here: on this machine.
    """
    device = devices.choose(machine.device)
    total, free = devices.memory_bytes(device)
    if device.type != "cuda":
        free += psutil.Process().memory_info().rss  # what this process already holds is counted in the ledger
    share = 1 if device.type == "cuda" else ranks_here
    limit = parse_bytes(machine.memory_limit) if machine.memory_limit is not None else int(USABLE_SHARE * free / share)
    while not folder.exists():
        folder = folder.parent
    return MachineFacts(
        device=device.type,
        device_name=devices.name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=total,
        memory_available_bytes=limit,
        disk_free_bytes=shutil.disk_usage(folder).free,
    )


def host_memory_bytes() -> int:
    """Of the memory beside an accelerator, what a plan may use."""
    return int(USABLE_SHARE * devices.memory_bytes(torch.device("cpu"))[1])
