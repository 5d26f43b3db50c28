"""Large arrays with pages of their own, which go back to the system as soon as the array is dropped.

While training, the C library keeps what is freed (`fullrank.parallel.quiet`): right for what every row needs again, wrong for a
copy of the embedding that is needed twice a step. The hole that it leaves is soon cut by something small that stays, and the next
copy takes memory anew.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch

#: Smaller arrays are the heap's.
_SMALLEST_BYTES = 8 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; with pages of their own where they are large and in this process's memory."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _SMALLEST_BYTES or sys.platform == "win32":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
