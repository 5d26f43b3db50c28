"""Tensors kept elsewhere between their uses: in a file, or in host memory beside an accelerator.

What is put comes back bit by bit, with its type and shape. Copies go on in the background and in the order they were asked
for, so a `get` after a `put` sees what was put, and what is waiting in memory is bounded: a few tensors, whatever the model. A
shelf serves one thread. The file has no name and is gone with the process, however that ends: state that must outlive the run
is in its checkpoints.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fullrank.errors import FitError, FullrankError
from fullrank.units import format_bytes


class Shelf(Protocol):
    """Where tensors are kept."""

    @property
    def names(self) -> Collection[str]:
        """What is there."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Keeps a copy, in place of what had the name; the tensor may be changed as soon as this returns."""

    def get(self, name: str) -> Tensor:
        """A fresh copy on the compute device.

        Raises:
            KeyError: when nothing was put under the name.
        """

    def fetch(self, names: Iterable[str]) -> None:
        """A hint that these are wanted next: they are read ahead as far as there is room for it."""

    def close(self) -> None:
        """Gives memory and disk back; the shelf is of no use afterwards."""


#: Room that a name is given when its tensor has outgrown the old one, beside the old one's.
_GROWTH = 1.5


@dataclass(frozen=True)
class _Place:
    offset: int
    room_bytes: int
    """What belongs to the name, however small its tensor is now."""
    bytes: int
    dtype: torch.dtype
    shape: torch.Size


class OnDisk:
    """A shelf in one nameless file, written and read by one thread.

    Room is taken when a name is new, so a full disk shows in `put`; a write that fails later shows in the next call.

    Args:
        folder: where the file lies.
        device: where `get` brings tensors.
        waiting_bytes: most bytes on their way to the disk, and as many read ahead; one tensor may be larger.
    """

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", waiting_bytes: int = 2**28) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._device = torch.device(device)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  -- lives as long as the shelf
        self._bytes = 0
        self._places: dict[str, _Place] = {}
        self._ahead: dict[str, Future[Tensor]] = {}
        self._limit = waiting_bytes
        self._unwritten_bytes = 0
        self._written = threading.Condition()
        self._failure: OSError | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shelf")

    @property
    def names(self) -> Collection[str]:
        return self._places.keys()

    def put(self, name: str, tensor: Tensor) -> None:
        self._check()
        self._ahead.pop(name, None)
        place = self._places[name] = self._place(name, tensor)
        with self._written:
            self._written.wait_for(lambda: not self._unwritten_bytes or self._unwritten_bytes + place.bytes <= self._limit)
            self._unwritten_bytes += place.bytes
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._worker.submit(self._write, place, copy)

    def get(self, name: str) -> Tensor:
        self._check()
        reading = self._ahead.pop(name, None) or self._worker.submit(self._read, self._places[name])
        try:
            tensor = reading.result()
        except OSError as error:
            raise self._error(error) from error
        self._check()  # the write before this read may have failed
        return tensor.to(self._device)

    def fetch(self, names: Iterable[str]) -> None:
        self._check()
        ahead_bytes = sum(self._places[name].bytes for name in self._ahead)
        for name in names:
            if name in self._places and name not in self._ahead:
                ahead_bytes += self._places[name].bytes
                if self._ahead and ahead_bytes > self._limit:
                    return
                self._ahead[name] = self._worker.submit(self._read, self._places[name])

    def close(self) -> None:
        self._ahead.clear()
        self._worker.shutdown(wait=True)
        self._file.close()

    def _place(self, name: str, tensor: Tensor) -> _Place:
        """The tensor's place in the file: where its name had one that is large enough, or a new one at the end."""
        size = tensor.numel() * tensor.element_size()
        old = self._places.get(name)
        if old and size <= old.room_bytes:
            return _Place(old.offset, old.room_bytes, size, tensor.dtype, tensor.shape)
        room = max(size, int(_GROWTH * old.room_bytes)) if old else size  # one that grew once grows again
        place = _Place(self._bytes, room, size, tensor.dtype, tensor.shape)
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), place.offset, room)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot; then the write tells
                raise self._error(error) from error
        self._bytes += -(-room // 4096) * 4096  # pages of the disk belong to one tensor each
        return place

    def _write(self, place: _Place, tensor: Tensor) -> None:
        try:
            left, offset = _bytes_of(tensor), place.offset
            while left:
                count = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[count:], offset + count
        except OSError as error:
            self._failure = error
        finally:
            with self._written:
                self._unwritten_bytes -= place.bytes
                self._written.notify()

    def _read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        left, offset = _bytes_of(tensor), place.offset
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if not count:
                raise OSError(errno.EIO, "the file ends early")
            left, offset = left[count:], offset + count
        return tensor

    def _check(self) -> None:
        if self._failure:
            raise self._error(self._failure) from self._failure

    def _error(self, error: OSError) -> FullrankError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return FitError(
                f"{self._folder}: no room for tensors kept on disk between steps ({error.strerror}), {format_bytes(self._bytes)} "
                "are there already",
                hint="free disk space or move the runs to a larger disk; the same command continues from the last checkpoint",
            )
        return FullrankError(f"{self._folder}: tensors kept on disk between steps: {error.strerror or error}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, no copy of it."""
    octets: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(octets)


@dataclass
class _Kept:
    """A tensor in host memory; `ahead` is its copy on the device while one is on its way."""

    room: Tensor
    """Bytes that belong to the name, however small its tensor is now."""
    host: Tensor
    ahead: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    registered: bool = False


class InHost:
    """A shelf in host memory, page-locked, with copies on a CUDA stream of their own; on the CPU a plain one.

    Args:
        device: where `get` brings tensors.
        waiting_bytes: most bytes read ahead on the device; one tensor may be larger.
    """

    def __init__(self, device: torch.device | str, *, waiting_bytes: int = 2**30) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None
        self._kept: dict[str, _Kept] = {}
        self._limit = waiting_bytes
        self._ahead_bytes = 0

    @property
    def names(self) -> Collection[str]:
        return self._kept.keys()

    def put(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach()
        kept = self._kept.get(name)
        if kept is None or kept.room.nbytes < tensor.nbytes:
            self._drop(name)
            kept = self._kept[name] = self._room(tensor)
        self._forget_ahead(kept)
        kept.host = kept.room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if self._stream is None or not tensor.is_cuda:
            if self._stream is not None:
                self._stream.synchronize()  # copies that still read or write the place
            kept.host.copy_(tensor)
            return
        # The caller may overwrite its tensor at once (on its stream), so the copy to the host is made from a copy.
        copy = tensor.clone()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept.host.copy_(copy, non_blocking=True)
        copy.record_stream(self._stream)

    def get(self, name: str) -> Tensor:
        kept = self._kept[name]
        if kept.ahead is None:
            self._send(kept)
        tensor, arrived = kept.ahead, kept.arrived
        assert tensor is not None
        self._forget_ahead(kept)
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            tensor.record_stream(current)
        return tensor

    def fetch(self, names: Iterable[str]) -> None:
        for name in names:
            kept = self._kept.get(name)
            if kept is not None and kept.ahead is None:
                if self._ahead_bytes and self._ahead_bytes + kept.host.nbytes > self._limit:
                    return
                self._send(kept)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        for name in list(self._kept):
            self._drop(name)

    def _send(self, kept: _Kept) -> None:
        """Starts the copy to the device; after the puts before it, which are on the same stream."""
        self._ahead_bytes += kept.host.nbytes
        if self._stream is None:
            kept.ahead = kept.host.clone()
            return
        with torch.cuda.stream(self._stream):
            kept.ahead = kept.host.to(self._device, non_blocking=True)
            kept.arrived = torch.cuda.Event()
            kept.arrived.record(self._stream)

    def _forget_ahead(self, kept: _Kept) -> None:
        if kept.ahead is not None:
            self._ahead_bytes -= kept.host.nbytes
            kept.ahead = kept.arrived = None

    def _room(self, tensor: Tensor) -> _Kept:
        if not self._cuda:
            room = torch.empty(tensor.nbytes, dtype=torch.uint8)
            return _Kept(room, room)
        # torch's page-locked allocator rounds up to a power of two, which would double a large tensor: such are registered.
        large = tensor.nbytes >= 2**20
        room = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=not large)
        if large:
            code = int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), room.nbytes, 0))
            if code:
                raise FitError(
                    f"host memory: {format_bytes(room.nbytes)} could not be page-locked (CUDA error {code})",
                    hint="free host memory or raise its limit (ulimit -l), or write machine.optimizer_states: disk",
                )
        return _Kept(room, room, registered=large)

    def _drop(self, name: str) -> None:
        kept = self._kept.pop(name, None)
        if kept is None:
            return
        self._forget_ahead(kept)
        if kept.registered:
            assert self._stream is not None
            self._stream.synchronize()  # a copy may still be reading or writing it
            torch.cuda.cudart().cudaHostUnregister(kept.room.data_ptr())
