"""The device a run computes on, what it can do, and the memory it used."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import psutil
import torch

from fullrank.errors import UsageError


def choose(wanted: str) -> torch.device:
    """The device a recipe asks for; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: when the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there[wanted]:
        found = ", ".join(name for name, present in there.items() if present)
        raise UsageError(f"machine.device: {wanted} is not available here (available: {found})", hint="use machine.device=auto")
    return torch.device(wanted)


def count(device_type: str) -> int:
    """Devices of that kind on this machine, where each can serve a process of its own; 1 elsewhere."""
    return max(1, torch.cuda.device_count()) if device_type == "cuda" else 1


def resolve_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, why it was chosen; empty where the recipe says it): `auto` is fp32 or bf16-mixed.

    bf16-mixed only where the device multiplies bf16 in hardware: elsewhere, as on CPUs without such units, it is slower. Weights
    stored in bf16 are another matter: a CPU widens them to compute (`fullrank.models.widened`).

    Raises:
        UsageError: bf16-mixed on a device without it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16-mixed" and not has_bf16:
        raise UsageError(
            f"train.precision: bf16-mixed needs a CUDA device with bf16 units; {device.type} has none that fullrank uses",
            hint="use train.precision=auto",
        )
    if wanted != "auto":
        return wanted, ""
    if has_bf16:
        return "bf16-mixed", "precision: bf16-mixed, since this device multiplies bf16 in hardware; weights and updates stay fp32"
    return "fp32", f"precision: fp32, since this {device.type} does not multiply bf16 in hardware"


def name(device: torch.device) -> str:
    """A name a person knows."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return _cpu_name()
    return platform.processor() or device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(all, free) bytes of the memory that training on this device fills."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    limit, used = (_number_in(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is None:  # no container, or one without a limit
        return memory.total, memory.available
    return min(memory.total, limit), min(memory.available, limit - (used or 0))


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's CPU allocator and some libraries say so in words only."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in words or "allocate memory" in words


def device_peak_bytes(device: torch.device) -> int | None:
    """Most memory tensors held on an accelerator since `reset_peak`; None where tensors live in the process's own memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Starts a new stretch for `device_peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything asked of it, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def best_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest product of square matrices, 1,024 to 4,096 wide (to 8,192 on an accelerator)."""
    best = 0.0
    for size in (1024, 2048, 4096, *((8192,) if device.type != "cpu" else ())):
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            torch.mm(one, other)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
