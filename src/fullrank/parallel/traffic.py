"""How much of a rank's time goes to telling other ranks: collectives as torch's profiler sees them, beside what is computed.

A collective is under way from when it is asked for until this rank has what it gave, so that its seconds hold those of waiting
for a rank that comes late. Those during which this rank computes nothing are exposed: they lengthen the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from fullrank.parallel import device as devices

_Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Traffic:
    """Seconds of a rank."""

    computing: float
    communicating: float
    exposed: float
    """Of those communicating, during which nothing is computed."""


def watched(device: torch.device, work: Callable[[], None]) -> Traffic:
    """What a rank does while it works.

    Args:
        device: that computes. Of a CPU, operators of torch are computing and gloo's work is communicating; of a CUDA device,
            its kernels are, NCCL's the latter.
        work: is called once.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        devices.synchronize(device)
    computing: _Spans = []
    communicating: _Spans = []
    for event in profiler.events() or ():
        on_device = event.device_type.name == "CUDA"
        span = (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        if event.name.startswith("gloo:") or (on_device and "nccl" in event.name):
            communicating.append(span)
        elif on_device or (not is_cuda and event.name.startswith("aten::")):
            computing.append(span)
    return divided(computing, communicating)


def divided(computing: Iterable[tuple[float, float]], communicating: Iterable[tuple[float, float]]) -> Traffic:
    """Seconds by kind, from when each thing began and ended; what overlaps counts once."""
    computing, communicating = list(computing), list(communicating)
    busy = _length(computing)
    return Traffic(busy, _length(communicating), _length(computing + communicating) - busy)


def _length(spans: _Spans) -> float:
    """Of their union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
