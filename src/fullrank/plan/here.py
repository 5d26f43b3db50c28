"""This machine as a cluster to simulate: its products, its memory and its links are measured, not taken from a data sheet."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from fullrank.errors import UsageError
from fullrank.meter import resident_bytes
from fullrank.parallel import device as devices
from fullrank.parallel import links
from fullrank.plan import speed
from fullrank.plan.cluster import THIS_MACHINE
from fullrank.plan.machine import USABLE_SHARE, look
from fullrank.plan.scaling import Subject
from fullrank.records import Cluster
from fullrank.run import Run

#: Larger than caches.
_COPIED_BYTES = 256 << 20
#: What nothing is known of: the network that would connect machines like this one. 10 Gb/s, and TCP's tenths of a millisecond.
_NETWORK_BYTES_PER_SECOND, _NETWORK_LATENCY_SECONDS = 1.25e9, 1e-4


#: Ranks of a CPU that are simulated unless more are asked for.
_CPU_RANKS = 4


def most() -> int:
    """Devices that are simulated of this machine unless another number is asked for."""
    device = devices.choose("auto")
    return _CPU_RANKS if device.type == "cpu" else devices.count(device.type)


def measured(subject: Subject, run: Run, config: PreTrainedConfig, *, ranks: int) -> tuple[Cluster, Subject]:
    """The cluster of this machine's devices, and the subject with the memory that a process takes of them.

    Args:
        subject: what is simulated.
        run: whose folder tells the disk.
        config: of the model.
        ranks: most that are simulated; links are measured where there are two or more.

    Raises:
        UsageError: the model is too large to be measured here, or several ranks are to be simulated of a machine with one
            accelerator, whose link is unknown.
        FullrankError: measuring failed.
    """
    recipe = subject.recipe
    device = devices.choose(recipe.machine.device)
    if device.type == "mps":
        raise UsageError(f"--device {THIS_MACHINE}: mps has one device, and FSDP2 knows none of its kind", hint="name another")
    is_cpu, count = device.type == "cpu", devices.count(device.type)
    if ranks > 1 and not is_cpu and count == 1:
        raise UsageError(
            f"--device {THIS_MACHINE}: there is one CUDA device here, so its link to another cannot be measured",
            hint="add --most 1, or name a device whose links are published",
        )
    machine = look(recipe.machine, run.root)
    bf16 = recipe.train.precision == "bf16-mixed" or (recipe.train.rounding != "none" and not is_cpu)
    best = devices.best_product_rate(device, torch.bfloat16 if bf16 else torch.float32)
    row = subject.looks.typical_row(subject.longest)
    rates = speed.measure(
        config,
        subject.facts,
        row,
        device=device,
        train=recipe.train,
        trained_parameters=subject.shapes.trained_parameters,
        recompute="none",
        available_bytes=machine.memory_available_bytes,
        tuned=ranks == 1,  # FSDP2 computes by the model's own modules
    )
    if rates is None:
        raise UsageError(
            f"--device {THIS_MACHINE}: measuring two blocks of this model would take more than half of the memory",
            hint="name another device (--device)",
        )
    rate = subject.products.needed(row) / (rates.forward_backward_per_token * row.tokens)
    best = max(best, rate)  # on a busy machine either may be the one that was disturbed
    link = links.measure(device.type) if ranks > 1 else links.Link(_memory_rate(device), 0.0)
    words = [
        f"measured here: {devices.name(device)}, {machine.threads} threads"
        if is_cpu
        else f"measured here: {devices.name(device)}",
        "the fastest product of square matrices, what of it one and two blocks of this model reach, a copy in memory",
    ]
    if ranks > 1:
        words.append("an all-gather and a reduce-scatter between two processes")
    words.append("the network to other machines like it (10 Gb/s) is assumed")
    return Cluster(
        device=THIS_MACHINE,
        device_type="cpu" if is_cpu else "cuda",
        source="; ".join(words),
        compute_type="bf16" if bf16 else "fp32",
        memory_bytes=int(machine.memory_available_bytes / USABLE_SHARE),
        flops_per_second=best,
        reached_ratio=rate / best,
        memory_bytes_per_second=_memory_rate(device),
        host_bytes_per_second=_memory_rate(device) if is_cpu else speed.host_bytes_per_second(device),
        devices_per_node=ranks if is_cpu else count,
        node_bytes_per_second=link.bytes_per_second,
        network_bytes_per_second=_NETWORK_BYTES_PER_SECOND,
        link_ratio=1.0,
        call_latency_seconds=0.0,
        node_latency_seconds=link.latency_seconds,
        network_latency_seconds=_NETWORK_LATENCY_SECONDS,
        overlap_ratio=0.0 if is_cpu else 0.9,
        shares_node=is_cpu,
    ), replace(subject, process_bytes=resident_bytes() if is_cpu else 0)


def _memory_rate(device: torch.device) -> float:
    """Bytes read and written in a second, by a copy."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        devices.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        devices.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * _COPIED_BYTES / best
