"""Shelves: what is put comes back bit by bit, in order, in bounded memory; a full disk is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fullrank.errors import FitError, FullrankError
from fullrank.optim.shelf import InHost, OnDisk, Shelf


@pytest.fixture(
    params=["disk", "host", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("disk-cuda", marks=pytest.mark.gpu)]
)
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    if "cuda" in request.param and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made: dict[str, Any] = {
        "disk": lambda: OnDisk(tmp_path),
        "host": lambda: InHost("cpu"),
        "cuda": lambda: InHost("cuda"),
        "disk-cuda": lambda: OnDisk(tmp_path, device="cuda"),
    }
    shelf = made[request.param]()
    yield shelf
    shelf.close()


def device_of(shelf: Any) -> torch.device:
    return shelf._device


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (700, 900)])
def test_type_shape_and_bits_come_back(shelf: Shelf, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, device=device_of(shelf)) * 50).to(dtype)
    shelf.put("a", tensor)
    shelf.put("b", tensor.T if len(shape) == 2 else tensor)
    back = shelf.get("a")
    assert (back.dtype, back.shape, bits(back)) == (dtype, tensor.shape, bits(tensor))
    assert back.device.type == tensor.device.type
    assert bits(shelf.get("b")) == bits(tensor.T if len(shape) == 2 else tensor)
    assert set(shelf.names) == {"a", "b"}


def test_both_ways_a_copy_is_made(shelf: Shelf) -> None:
    tensor = torch.ones(1000, 1000, device=device_of(shelf))
    shelf.put("a", tensor)
    tensor.zero_()
    shelf.get("a").zero_()
    shelf.fetch(["a"])
    assert shelf.get("a").eq(1).all()
    assert shelf.get("a").eq(1).all()


def test_the_last_put_is_what_is_got_even_when_it_was_read_ahead(shelf: Shelf) -> None:
    for turn in range(20):
        shelf.put("a", torch.full((300_000,), float(turn), device=device_of(shelf)))
        shelf.put("b", torch.full((300_000,), float(-turn), device=device_of(shelf)))
        shelf.fetch(["b", "a", "unknown"])
        if turn % 3 == 0:
            shelf.put("a", torch.full((300_000,), 0.5, device=device_of(shelf)))
        assert shelf.get("a").eq(0.5 if turn % 3 == 0 else turn).all()
        assert shelf.get("b").eq(-turn).all()


def test_another_shape_takes_another_place(shelf: Shelf) -> None:
    for name in "abc":
        shelf.put(name, torch.full((1000,), float(ord(name)), device=device_of(shelf)))
    for elements in (2000, 3, 1500):
        shelf.put("b", torch.arange(float(elements), device=device_of(shelf)))
        assert torch.equal(shelf.get("b").cpu(), torch.arange(float(elements)))
    assert shelf.get("a").eq(ord("a")).all() and shelf.get("c").eq(ord("c")).all()


def test_what_was_never_put_is_a_key_error(shelf: Shelf) -> None:
    with pytest.raises(KeyError):
        shelf.get("a")


def test_rewriting_does_not_grow_the_file(tmp_path: Path) -> None:
    shelf = OnDisk(tmp_path)
    sizes = []
    for turn in range(5):
        for name in "abc":
            shelf.put(name, torch.full((10_000,), float(turn)))
        shelf.get("c")
        sizes.append(os.fstat(shelf._file.fileno()).st_size)
    shelf.close()
    assert len(set(sizes)) == 1
    assert 3 * 40_000 <= sizes[0] <= 3 * 40_000 + 3 * 4096
    assert list(tmp_path.iterdir()) == []  # nameless, so nothing is left whatever happens


def test_waiting_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = OnDisk(tmp_path, waiting_bytes=100_000)
    most = 0
    slow_write = OnDisk._write

    def watched(self: OnDisk, *args: Any) -> None:
        nonlocal most
        most = max(most, self._unwritten_bytes)
        slow_write(self, *args)

    monkeypatch.setattr(OnDisk, "_write", watched)
    for index in range(50):
        shelf.put(str(index), torch.full((10_000,), float(index)))
    shelf.fetch(str(index) for index in range(50))
    assert len(shelf._ahead) == 2
    assert all(shelf.get(str(index)).eq(index).all() for index in range(50))
    assert 40_000 <= most <= 100_000
    shelf.put("larger than the bound", torch.ones(200_000))
    assert shelf.get("larger than the bound").eq(1).all()
    shelf.close()


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_when_room_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = OnDisk(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(FitError, match="no room"):
        shelf.put("a", torch.ones(10))
    assert "a" not in shelf.names
    shelf.close()


@pytest.mark.parametrize("call", ["put", "get", "fetch"])
def test_a_write_that_fails_is_told_at_the_next_call(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = OnDisk(tmp_path)
    shelf.put("a", torch.ones(10))
    shelf.get("a")
    monkeypatch.setattr(os, "pwrite", full_disk)
    shelf.put("b", torch.ones(10))
    if call != "get":
        shelf._worker.submit(lambda: None).result()  # the failed write is over
    with pytest.raises(FitError, match="no room"):
        {"put": lambda: shelf.put("c", torch.ones(1)), "get": lambda: shelf.get("b"), "fetch": lambda: shelf.fetch(["a"])}[call]()
    shelf.close()


def test_other_failures_of_the_disk_are_fullranks_errors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = OnDisk(tmp_path)
    shelf.put("a", torch.ones(10))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(FullrankError, match="ends early"):
        shelf.get("a")
    shelf.close()


def test_partial_writes_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:1001], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:777]], offset))
    shelf = OnDisk(tmp_path)
    tensor = torch.randn(5000)
    shelf.put("a", tensor)
    assert torch.equal(shelf.get("a"), tensor)
    shelf.close()
