"""From fp32 back to bf16 weights without losing small updates: by chance, with a remainder kept, or to the nearest.

bf16 has 8 significant bits, so the nearest bf16 number swallows every update below half a unit in the last place (about 1/512
of the weight), and most updates of fine-tuning are. *Stochastic* rounding goes up or down with the probability that makes the
mean exact; *Kahan* rounding keeps what was cut off in a second bf16 tensor and adds it next time (both: Zamirai et al. 2020,
arXiv 2010.06192, sections 4 and 5; the summation is Kahan's of 1965). *Nearest* is what the authors of LOMO publish.

Chance is a hash of (key, index of the element in the whole tensor), not a generator with a state. So the same key gives the
same weights, however the tensor is cut up, on whatever device, threads or ranks, and in whatever order tensors are updated.
"""

from __future__ import annotations

import functools
import hashlib
import sys

import torch
from torch import Tensor

#: Elements that a pass works on: few enough that what a pass writes the next finds in the cache (on CUDA: enough to fill it).
CHUNK = 2**18
CUDA_CHUNK = 2**22


def chunk_elements(device: torch.device) -> int:
    """Elements to work on at a time on a device."""
    return CUDA_CHUNK if device.type == "cuda" else CHUNK


def tensor_key(key: int, name: str) -> int:
    """64 bits for one tensor in one update: the update's key and the tensor's name, mixed."""
    return int.from_bytes(hashlib.blake2b(f"{key} {name}".encode(), digest_size=8).digest(), sys.byteorder)


def stochastic_(target: Tensor, values: Tensor, *, key: int, start: int = 0) -> None:
    """Rounds to one of the two bf16 neighbours, to the nearer one more often: the mean over keys is the value.

    A bf16 number is the upper half of an fp32 number, so adding 16 random bits to the lower half and cutting it off carries
    into the upper half with probability (lower half) / 2^16. What bf16 holds exactly, zeros, infinities and subnormal numbers
    among it, stays as it is.

    Args:
        target: flat, bf16.
        values: flat, fp32, as long; overwritten.
        key: see `tensor_key`.
        start: index of the first element in the whole tensor.
    """
    step = chunk_elements(values.device)
    bits = values.view(torch.int32)
    at = 0
    while at < len(values):
        # A stretch never reaches across a multiple of 2^33 elements, where the pairs' counter of 32 bits starts anew.
        count = min(step, len(values) - at, 2**33 - (start + at) % 2**33)
        part = bits[at : at + count]
        part.add_(_sixteen_bits(key, start + at, count, values.device)).add_(2**15)  # from [-2^15, 2^15) to [0, 2^16)
        part.bitwise_and_(-(2**16))
        at += count
    target.copy_(values)


def kahan_(target: Tensor, compensation: Tensor, values: Tensor) -> None:
    """Rounds to the nearest and keeps the rest: target + compensation is the value to about 16 significant bits.

    The rest is rounded to the nearest bf16 number itself, so what is lost in the end is updates below 2^-17 of the weight while
    the rest is at its largest, and only smaller ones while it is small.

    Args:
        target: flat, bf16.
        compensation: flat, bf16: what is missing in the target.
        values: flat, fp32: weight + compensation + update; overwritten.
    """
    target.copy_(values)
    compensation.copy_(values.sub_(target))


def _sixteen_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random signed 16-bit numbers for the elements from `start`: a hash of 32 bits serves two neighbours.

    The hash is lowbias32 (Wellons, "Prospecting for hash functions", 2018), two multiplications between shifts, over a counter;
    half of the key moves the counter, the other half is mixed in after the first multiplication, so that two keys' numbers are
    not one sequence read from two places. Shifts of int32 carry the sign along, hence the masks.
    """
    first = start // 2
    moved, mixed = _halves(key, first >> 32)
    pairs = (start + count + 1) // 2 - first
    x = _counter(device)[:pairs] + _signed(first + moved)
    shifted = torch.empty_like(x)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF))
    x.mul_(0x7FEB352D).bitwise_xor_(mixed)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF))
    x.mul_(_signed(0x846CA68B))
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF))
    return x.view(torch.int16)[start % 2 : start % 2 + count]


@functools.lru_cache(maxsize=4)
def _counter(device: torch.device) -> Tensor:
    return torch.arange(chunk_elements(device) // 2 + 1, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=1024)
def _halves(key: int, high: int) -> tuple[int, int]:
    """Two signed numbers of 32 bits from the key and what of the counter is above 32 bits."""
    digest = hashlib.blake2b(f"{key} {high}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little"))


def _signed(number: int) -> int:
    """The number's lowest 32 bits as int32 reads them."""
    return (number + 2**31) % 2**32 - 2**31
