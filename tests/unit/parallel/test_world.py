"""Who a process is among ranks, and which device is its own; what ranks tell one another is tested with ranks."""

from __future__ import annotations

import pytest
import torch

from fullrank.errors import UsageError
from fullrank.parallel.world import World, cuda_index, told


def test_a_launcher_says_who_a_process_is() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert told(variables) == World(5, 8, 1, 4)
    assert told({}) is None
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE"):
        told({name: value for name, value in variables.items() if name != "LOCAL_WORLD_SIZE"})


@pytest.mark.parametrize(("devices", "local_rank", "index"), [(4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_a_rank_has_the_device_of_its_number_or_the_only_one_it_sees(
    devices: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert cuda_index(World(local_rank, 4, local_rank, 4)) == index


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="rank 7 is number 3 on its machine, counted from 0, which has 2 CUDA devices"):
        cuda_index(World(7, 8, 3, 4))
