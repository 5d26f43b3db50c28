"""`srun fullrank train RECIPE`: what Slurm tells a task, told as torchrun tells it.

Only inside a step of several tasks: in a batch script itself, or a shell that salloc opened, Slurm's variables are set as well,
and nobody else would come.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping

from fullrank.errors import UsageError

_FIRST_PORT, _PORTS = 20_000, 20_000


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables of a rank where srun started this process as one of several, and no other launcher did.

    Raises:
        UsageError: Slurm's variables do not say who is where.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if size == "1" or "RANK" in environment:
        return
    try:
        counts = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": size,
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
            # Every task must come to the same port, and two steps on one node to different ones.
            "MASTER_PORT": str(_FIRST_PORT + (int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % _PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(
            f"srun started {size} tasks, but its variables do not say who is where ({error})",
            hint="start the tasks with `fullrank launch slurm`, or run torchrun on every node",
        ) from None
    for name, value in found.items():
        environment.setdefault(name, value)


def _tasks_per_node(text: str) -> list[int]:
    """`8(x3),4` is 8 tasks on each of three nodes and 4 on the next."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first of `node[03-07,9]`, by Slurm's own reading of it."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"scontrol show hostnames {nodes}: {error}") from None
    return done.stdout.splitlines()[0].strip()
