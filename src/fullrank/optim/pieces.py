"""Pieces of tensors: what a rank holds of a tensor that is divided among ranks, as one stretch of its flat elements.

Elementwise rules update a piece as they would the whole. The others are given the whole tensor, gathered for as long as the
update takes, and each rank keeps its piece of what comes out, so that what is learned does not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`count` flat elements from `start` of a tensor."""

    start: int
    count: int
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.count == self.numel

    @property
    def stretch(self) -> slice:
        """Where it lies among the flat elements of the whole."""
        return slice(self.start, self.start + self.count)


class Gather(Protocol):
    """Puts the ranks' pieces together."""

    def __call__(self, piece: Piece, elements: Tensor) -> Tensor:
        """The whole tensor, flat, on every rank; all ranks ask for it at the same time.

        Args:
            piece: this rank's.
            elements: its elements, flat.
        """


class Pieces(Mapping[str, Tensor]):
    """Tensors by name as this rank holds them, and which of them are pieces.

    Args:
        tensors: of which each is made when it is asked for, if the mapping does so.
        pieces: of those that are divided.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> None:
        self._tensors, self.pieces = tensors, dict(pieces)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


Read = Callable[[int, int], Tensor]
"""(first element, count) -> these elements of a saved piece, flat."""


@runtime_checkable
class Parts(Protocol):
    """Tensors that may have been divided when they were saved, whatever they are divided into now."""

    def parts(self, name: str) -> list[tuple[Piece, Read]]:
        """The pieces there are of a tensor, in their order; of one that was not divided, all of it."""


def parts_of(tensors: Mapping[str, Tensor], name: str) -> list[tuple[Piece, Read]] | None:
    """A tensor's saved pieces; None where it comes from memory, as this rank has it."""
    return tensors.parts(name) if isinstance(tensors, Parts) else None


def assembled(parts: Iterable[tuple[Piece, Read]], wanted: Piece, dtype: torch.dtype) -> Tensor:
    """The wanted elements, flat, out of the parts that hold them; no others are read.

    Raises:
        ValueError: some are in no part.
    """
    out = torch.empty(wanted.count, dtype=dtype)
    found = 0
    for piece, read in parts:
        low, high = max(piece.start, wanted.start), min(piece.start + piece.count, wanted.start + wanted.count)
        if low < high:
            out[low - wanted.start : high - wanted.start].copy_(read(low - piece.start, high - low))
            found += high - low
    if found != wanted.count:
        raise ValueError(f"{wanted.count - found} of {wanted.count} elements were saved by no rank")
    return out


def own_elements(tensors: Mapping[str, Tensor], name: str, piece: Piece, dtype: torch.dtype) -> Tensor:
    """This rank's elements of a tensor, flat: out of what was saved, or out of memory, where they are the piece or the whole.

    Raises:
        ValueError: some are in no part.
    """
    there = parts_of(tensors, name)
    if there is not None:
        return assembled(there, piece, dtype)
    flat = tensors[name].reshape(-1)
    return flat if len(flat) == piece.count else flat[piece.stretch]
