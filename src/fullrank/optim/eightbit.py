"""Moments in 8 bits: blocks of 256 numbers, each with its own fp32 scale.

As in Dettmers et al. 2022 (arXiv 2110.02861, section 2), a block's largest magnitude is its scale, so one outlier spoils 256
numbers and not a tensor, and codes lie closer together towards zero, where most moments are. The codes are companded: equal
steps of a root of the number, the square root for the signed first moment (127 levels to each side), the fourth root for the
second (255 levels).

The first moment is off by at most `sqrt(s)/127 + 1/254^2` of its block's largest where it is the share s of that: 0.8 % for the
largest. The root of the second moment, by which AdamW divides, is off by at most `1/(255 s^(1/4)) + 1/510^2/s^(1/2)` of itself:
0.4 % for the largest, 1.2 % at s = 1 %, 4 % at s = 0.01 %. On simulated moments whose size varies by a factor of e from row to
row and from column to column, the root mean square error of AdamW's update is 3.3 %, and 4.1 % with the dynamic map of the
paper. Zero stays zero, and a second moment above zero is never coded as zero, since AdamW divides by its root: the smallest code
is 2.4e-10 of the largest. Rounding is to the nearest, as in the published 8-bit optimizers: a second moment that shrinks by less
than half a step in an update stays until the next gradient lifts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers that share a scale.
BLOCK = 256
#: Smaller tensors keep fp32: norms and biases cost nothing, and are what 8 bits serve worst (Dettmers et al. 2022, section 4).
SMALLEST = 4096
_TINY = torch.finfo(torch.float32).tiny


def blocks(elements: int) -> int:
    """Scales of so many elements."""
    return -(-elements // BLOCK)


@dataclass(frozen=True)
class Code:
    """Eight bits for a number in [-1, 1] (signed) or [0, 1]: equal steps of a root of it."""

    signed: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """fp32 numbers, flat.

        Args:
            codes: flat, beginning at a block.
            scales: of the blocks; the last one may be cut short.
        """
        values = codes.float()
        if self.signed:
            values.mul_(values.abs())
        else:
            values.square_().square_()
        for rows, scale in _rows(values, scales * (127.0**-2 if self.signed else 255.0**-4)):
            rows.mul_(scale)
        return values

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Writes codes and scales of flat fp32 values, which are overwritten."""
        shares = values.abs() if self.signed else values
        for rows, scale in _rows(shares, scales):
            torch.amax(rows, dim=1, keepdim=True, out=scale)
            rows.div_(scale.clamp_(min=_TINY))  # a block of zeros: 0 / tiny
        if self.signed:
            codes.copy_(torch.copysign(shares.sqrt_().mul_(127.0), values, out=shares).round_())
        else:
            above_zero = torch.sign(values)
            codes.copy_(torch.maximum(values.sqrt_().sqrt_().mul_(255.0).round_(), above_zero, out=values))


#: Of AdamW's moments.
CODES = {"exp_avg": Code(signed=True), "exp_avg_sq": Code(signed=False)}


def _rows(values: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks as rows with their scales as a column: the whole ones, then the one cut short."""
    whole = len(values) // BLOCK
    if whole:
        yield values[: whole * BLOCK].view(whole, BLOCK), scales[:whole].view(whole, 1)
    if len(values) % BLOCK:
        yield values[whole * BLOCK :].view(1, -1), scales[whole:].view(1, 1)
