"""The generators that dropout draws from, as they were: what is computed again draws what it drew before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Draws(NamedTuple):
    """States of the generators."""

    host: torch.Tensor
    device: torch.Tensor | None
    """Of a CUDA device; None elsewhere."""


def draws(device: torch.device) -> Draws:
    """The states now."""
    return Draws(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


@contextlib.contextmanager
def drawn(device: torch.device, states: Draws | None) -> Iterator[None]:
    """Inside, the generators go on from the states; afterwards they are as before. None changes nothing."""
    if states is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states.host)
        if states.device is not None:
            torch.cuda.set_rng_state(states.device, device)
        yield
