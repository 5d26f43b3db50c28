"""The ranks of a run: who this process is among them, and what they tell one another.

A rank is a process with one device. Everything here is about numbers and facts small enough for JSON; weights and gradients
travel in the engines. A world of one asks nobody and waits for nobody, so callers need no other path for it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from fullrank.errors import UsageError

#: What torchrun tells each process it starts (https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables).
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """All ranks, as one of them sees them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def summed(self, *numbers: float) -> tuple[float, ...]:
        """Each number's sum over the ranks, in double precision; the same on all of them."""
        if self.size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(totals)
        return tuple(totals.tolist())

    def any(self, said: bool) -> bool:
        """Whether any rank says so."""
        return self.summed(float(said))[0] > 0

    def gathered(self, facts: Any) -> list[Any]:
        """What each rank says, by rank; facts are what JSON can hold."""
        if self.size == 1:
            return [facts]
        mine = torch.from_numpy(np.frombuffer(json.dumps(facts).encode(), np.uint8).copy())
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(mine)
        distributed.all_reduce(lengths)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(everyone, padded)
        return [json.loads(bytes(one[:length].numpy())) for one, length in zip(everyone, lengths.tolist(), strict=True)]

    def wait(self) -> None:
        """Returns once every rank is here."""
        self.summed(0.0)


#: A world of this process alone.
ALONE = World()


def own_seed(seed: int, world: World) -> int:
    """A seed of a rank's own, from one that all have: of 63 bits, as generators take them."""
    return (seed * world.size + world.rank) % (1 << 63)


def told(environment: Mapping[str, str] = os.environ) -> World | None:
    """The rank that a launcher made this process; None where none did (srun: `fullrank.cli.srun`).

    Raises:
        UsageError: the launcher's variables are not all there, or no numbers.
    """
    if "RANK" not in environment:
        return None
    try:
        rank, size, local_rank, local_size = (int(environment[name]) for name in _TOLD)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK is set, so a launcher started this process, but not all of {', '.join(_TOLD)} are numbers ({error})",
            hint="start it with torchrun, or unset RANK",
        ) from None
    return World(rank, size, local_rank, local_size)


def cuda_index(world: World) -> int:
    """The number of this rank's CUDA device: the rank's own on its machine, or the only one that its launcher lets it see (as
    `srun --gpus-per-task=1` does).

    Raises:
        UsageError: the machine has fewer devices than ranks.
    """
    devices = torch.cuda.device_count()
    if devices == 1:
        return 0
    if world.local_rank >= devices:
        raise UsageError(
            f"rank {world.rank} is number {world.local_rank} on its machine, counted from 0, which has {devices} CUDA devices",
            hint="start one rank a device: parallel.ranks, or torchrun's --nproc-per-node",
        )
    return world.local_rank


@contextlib.contextmanager
def joined(world: World, device_type: str, *, patience_seconds: float) -> Iterator[World]:
    """Inside, the ranks of a launcher can hear one another.

    Args:
        world: as `told`.
        device_type: of the ranks' devices; control goes over gloo in any case, tensors of CUDA devices over NCCL.
        patience_seconds: how long a rank waits for the others before it gives up.

    Raises:
        UsageError: there is no CUDA device for this rank.
    """
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(cuda_index(world))
    if world.size == 1:  # FSDP2 wants a group of one, too
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=patience_seconds))
    try:
        yield world
    finally:
        distributed.destroy_process_group()
