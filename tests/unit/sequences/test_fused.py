"""A library's head: taken where it is right and faster, left where it is not, and the loss law holds with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from fullrank.models.rows import RowModel
from fullrank.sequences import fused
from fullrank.sequences.head import Head
from fullrank.sequences.layout import micro_batches
from fullrank.sequences.loss import add_gradients, row_loss

CPU = torch.device("cpu")


def a_head(*, bias: bool = False, **changes: Any) -> Head:
    generator = torch.Generator().manual_seed(2)
    bias_V = torch.nn.Parameter(torch.randn(60, generator=generator)) if bias else None
    return Head(torch.nn.Parameter(torch.randn(60, 24, generator=generator)), bias_V, 1.0, None)._replace(**changes)


def plain(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets, reduction="sum")


def wrong(*given: Any) -> torch.Tensor:
    return plain(*given) * 1.01


def slow(*given: Any) -> torch.Tensor:
    time.sleep(0.2)
    return plain(*given)


def failing(*given: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel for this device")


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_right_and_faster_is_taken(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(fused, "_own", slow)
    monkeypatch.setattr(fused, "candidates", lambda: iter([failing, wrong, plain]))
    assert fused.with_fastest(a_head(bias=bias), CPU, torch.float32).summed is plain


@pytest.mark.parametrize("loss", [wrong, slow, failing])
def test_what_is_wrong_or_slower_is_left(monkeypatch: pytest.MonkeyPatch, loss: Any) -> None:
    if loss is not slow:
        monkeypatch.setattr(fused, "_own", slow)  # so that it is not its time that it is left for
    monkeypatch.setattr(fused, "candidates", lambda: iter([loss]))
    assert fused.with_fastest(a_head(), CPU, torch.float32).summed is None


def test_a_trial_needs_no_gradients_to_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "candidates", lambda: iter([plain]))
    with torch.no_grad():
        fused.with_fastest(a_head(), CPU, torch.float32)


@pytest.mark.parametrize("changes", [{"scale": 2.0}, {"cap": 3.0}])
def test_scaled_and_capped_heads_are_our_own(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr(fused, "candidates", lambda: pytest.fail("asked"))
    assert fused.with_fastest(a_head(**changes), CPU, torch.float32).summed is None


def test_liger_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature of Liger 0.5 to 0.7: (weight, input, target, bias)."""

    class Stand:
        def __init__(self, *, reduction: str) -> None:
            assert reduction == "sum"

        def __call__(self, weight: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return plain(hidden, target, weight, bias)

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(fused, "_own", slow)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", failing, raising=False)
    found = fused.with_fastest(a_head(bias=True), CPU, torch.float32)
    assert found.summed is not None


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_a_step_with_torchs_own_is_the_same_step(tmp_path: Path, family: str) -> None:
    examples = tiny.random_tokens(5, vocabulary=300, seed=1, longest=30)
    batch = micro_batches(tiny.write_store(tmp_path, examples), range(5), 1000, packed=True)[0]
    assert batch.supervised_tokens == len(batch.targets_S)
    gradients = []
    for summed in (None, fused.torch_loss):
        rows = RowModel(tiny.model(family, vocabulary=300), adds_gradients=True)
        assert rows.head is not None
        rows.head = rows.head._replace(summed=summed)
        with rows.ready():
            loss = add_gradients(rows, batch, 70)
        gradients.append([loss, *(p.grad for p in rows.model.parameters())])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_predictions_that_count_for_several_are_our_own(tmp_path: Path) -> None:
    twice = tiny.random_tokens(1, vocabulary=300, seed=1, longest=30) * 2
    batch = micro_batches(tiny.write_store(tmp_path, twice), range(2), 1000, packed=True)[0]
    rows = RowModel(tiny.model("llama", vocabulary=300))
    assert rows.head is not None
    wanted = row_loss(rows, batch, 10)
    rows.head = rows.head._replace(summed=failing)
    assert batch.supervised_tokens > len(batch.targets_S)
    torch.testing.assert_close(row_loss(rows, batch, 10), wanted)
