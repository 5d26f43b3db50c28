"""Tensors in safetensors files, read one at a time into memory of their own.

A mapped file counts as the process's memory page by page, as long as it is open, and a tensor of another type is a copy beside
it. Here the header is read, and then a tensor's bytes go straight to where the tensor will live; where that is of another type or
on another device they go through a small buffer. Reading costs what is made, and that buffer. Nothing stays open.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from fullrank.errors import ModelError

#: Numbers that are in the small buffer at once.
_PIECE = 1 << 20
_CPU = torch.device("cpu")

#: The format's names of types that torch has, too (https://github.com/huggingface/safetensors#format).
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def part(self, start: int, count: int) -> StoredTensor:
        """`count` of its flat elements, from `start`, as a tensor of one dimension."""
        return StoredTensor(self.path, self.offset + start * self.dtype.itemsize, self.dtype, (count,))

    def read(self, *, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on a device, in a type (its own, if none is given)."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        self.read_into(out)
        return out

    def read_into(self, out: torch.Tensor) -> None:
        """Fills a contiguous tensor of the same shape, of any type, on any device."""
        flat = out.detach().view(-1)
        if out.dtype == self.dtype and out.device.type == "cpu":
            with self.path.open("rb", buffering=0) as file:
                self._fill(file, flat, 0)
            return
        for low, piece in self.pieces():
            flat[low : low + len(piece)].copy_(piece)

    def equals(self, tensor: torch.Tensor) -> bool:
        """Whether the file holds these very numbers once they are of the tensor's type."""
        if self.shape != tuple(tensor.shape):
            return False
        flat = tensor.detach().reshape(-1)
        return all(torch.equal(piece.to(flat.dtype), flat[low : low + len(piece)].cpu()) for low, piece in self.pieces())

    def becomes(self, other: StoredTensor) -> bool:
        """Whether another file holds these very numbers, once they are of its type."""
        if self.shape != other.shape:
            return False
        pairs = zip(self.pieces(), other.pieces(), strict=True)
        return all(torch.equal(mine.to(theirs.dtype), theirs) for (_, mine), (_, theirs) in pairs)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of its first number, numbers), flat; the next piece takes the memory of the one before."""
        if not self.numel:
            return
        # Memory of its own pages: in the heap, what is allocated meanwhile would keep what a buffer leaves from being given back.
        buffer = torch.frombuffer(mmap.mmap(-1, min(self.numel, _PIECE) * self.dtype.itemsize), dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for low in range(0, self.numel, _PIECE):
                piece = buffer[: min(_PIECE, self.numel - low)]
                self._fill(file, piece, low)
                yield low, piece

    def _fill(self, file: FileIO, piece: torch.Tensor, low: int) -> None:
        if not piece.numel():
            return
        rest = piece.view(torch.uint8).numpy().data
        file.seek(self.offset + low * self.dtype.itemsize)
        while rest:
            found = file.readinto(rest)
            if not found:
                raise ModelError(f"{self.path}: not a whole safetensors file: it ends too early", hint="fetch or copy it again")
            rest = rest[found:]


class StoredTensors(Mapping[str, torch.Tensor]):
    """Name -> tensor of some safetensors files, read anew whenever it is asked for.

    Raises:
        ModelError: one is not a whole safetensors file.
    """

    def __init__(self, *paths: Path) -> None:
        self.index = {name: tensor for path in paths for name, tensor in _header(path).items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.index[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's weights, as transformers finds them: one file, or those that an index names.

    Others, such as the `consolidated.safetensors` of another library, are not the model's.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        parts: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(parts.values()))]
    return sorted(folder.glob("*.safetensors"))


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself.

    Raises:
        ModelError: it is not a whole safetensors file.
    """
    with _a_whole_file(path):
        found: dict[str, str] = _entries(path)[2].get("__metadata__", {})
        return found


def _entries(path: Path) -> tuple[int, int, dict[str, Any]]:
    """(bytes of the file, of its header, the header)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError("its header is cut off")
        return size, length, json.loads(file.read(length))


@contextlib.contextmanager
def _a_whole_file(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}", hint="fetch or copy it again") from None


def _header(path: Path) -> dict[str, StoredTensor]:
    with _a_whole_file(path):
        size, length, entries = _entries(path)
        found = {}
        for name in sorted(entries.keys() - {"__metadata__"}):
            low, high = entries[name]["data_offsets"]
            tensor = StoredTensor(path, 8 + length + low, _TYPES[entries[name]["dtype"]], tuple(entries[name]["shape"]))
            if high - low != tensor.numel * tensor.dtype.itemsize or 8 + length + high > size:
                raise ValueError(f"{name} is cut off")
            found[name] = tensor
        return found
