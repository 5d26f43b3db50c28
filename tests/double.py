"""Everything in float64: with it, what is left between two ways to compute the same is an error and no rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

_FLOAT32 = torch.float32


@contextlib.contextmanager
def everything_double() -> Iterator[None]:
    """transformers' norms, rotary angles, routers and losses, and fullrank's, ask for fp32 by name: here they get float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(_FLOAT32)
