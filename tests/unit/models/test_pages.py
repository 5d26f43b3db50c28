"""Arrays with pages of their own."""

from __future__ import annotations

import gc

import pytest
import torch

from fullrank.meter import resident_bytes
from fullrank.models import pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1000, 9000)])
def test_they_are_zeros_to_write_in(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = pages.zeros(shape, dtype, CPU)
    assert found.shape == shape and found.dtype == dtype and not found.any()
    found += 1
    assert torch.equal(found, torch.ones(shape, dtype=dtype))


def test_memory_comes_back_with_the_array() -> None:
    before = resident_bytes()
    array = pages.zeros((64, 1 << 20), torch.float32, CPU).fill_(1.0)
    assert resident_bytes() - before > 0.9 * array.nbytes
    del array
    gc.collect()
    assert resident_bytes() - before < 20 << 20
