"""16-bit weights that compute in fp32: the numbers of an fp32 model, one block wide at a time, the stored tensors untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fullrank.models.blocks import blocks_of
from fullrank.models.rows import RowModel
from fullrank.models.tuned import Tuned
from fullrank.models.widened import OUTSIDE, Widened

FAMILIES = ["llama", "gpt2", "gemma3", "qwen3", "phi", "gemma2", "qwen3_moe"]
IDS = torch.tensor([[5, 9, 12, 5, 319, 40, 7, 200, 11, 3]])


def pair(family: str, **changes: Any) -> tuple[Any, Any]:
    """A model of bf16 weights, and the fp32 model of the same numbers."""
    stored, wide = tiny.model(family, **changes), tiny.model(family, **changes)
    for parameter in stored.parameters():  # not buffers: they are fp32 in a model that was loaded, too
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        for one, other in zip(wide.parameters(), stored.parameters(), strict=True):
            one.copy_(other)
    return stored, wide


def wide_blocks(widened: Widened) -> list[int]:
    return [
        number
        for number, unit in enumerate(widened.units)
        if unit != OUTSIDE and any(p.dtype == torch.float32 for p in widened.parameters(unit))
    ]


@contextlib.contextmanager
def recomputing(widened: Widened, grads: dict[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Blocks that are opened for their forward pass, opened and computed once more in the backward pass, and whose gradients are
    taken off when they are closed: what an engine does, in short."""

    class Block(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, block: nn.Module, call: Any, hidden: torch.Tensor) -> torch.Tensor:
            ctx.block, ctx.call = block, call
            ctx.save_for_backward(hidden)
            with widened.opened(block), torch.no_grad():
                out: torch.Tensor = call(hidden)
            return out

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor | None]:
            hidden = ctx.saved_tensors[0].detach().requires_grad_()
            with widened.opened(ctx.block), torch.enable_grad():
                assert len(wide_blocks(widened)) == 1
                ctx.call(hidden).backward(grad)
                for parameter in widened.parameters(ctx.block):
                    assert parameter.grad is not None and parameter.grad.dtype == torch.float32
                    grads[parameter], parameter.grad = parameter.grad, None
            return None, None, hidden.grad

    def forward_of(block: nn.Module) -> Any:
        own = block.forward
        return lambda hidden, *rest, **named: Block.apply(block, lambda moved: own(moved, *rest, **named), hidden)

    blocks = [unit for unit in widened.units if isinstance(unit, nn.Module)]
    for block in blocks:
        block.forward = forward_of(block)
    try:
        with widened.manual():
            yield
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize("tuned", [False, True], ids=["", "tuned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_fp32_models(family: str, tuned: bool) -> None:
    stored, wide = pair(family, num_hidden_layers=3) if family not in ("gemma2", "gemma3") else pair(family)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in stored.named_parameters()}
    widened, grads = Widened(stored), {}
    modules = [Tuned(model) if tuned else None for model in (stored, wide)]
    with modules[1]() if modules[1] else contextlib.nullcontext():
        wanted = wide(input_ids=IDS, use_cache=False).logits
        wanted.square().sum().backward()
    with modules[0]() if modules[0] else contextlib.nullcontext(), recomputing(widened, grads), widened.opened(OUTSIDE):
        found = stored(input_ids=IDS, use_cache=False).logits
        found.square().sum().backward()
        if modules[0]:
            modules[0].settle()
        for parameter in widened.parameters(OUTSIDE):
            grads[parameter], parameter.grad = parameter.grad, None
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    for (name, parameter), theirs in zip(stored.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(grads[parameter], theirs.grad), name
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == before[name][0], name
        assert torch.equal(parameter, before[name][1]) and parameter.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_opens_one_block_at_a_time(family: str) -> None:
    stored, wide = pair(family)
    widened, seen = Widened(stored), []
    for block in blocks_of(stored) or []:
        own = block.forward
        block.forward = lambda *a, _own=own, **k: (seen.append(wide_blocks(widened)), _own(*a, **k))[1]
    with torch.no_grad(), widened.forward(), widened.forward():
        assert torch.equal(stored(input_ids=IDS).logits, wide(input_ids=IDS).logits)
        assert wide_blocks(widened) == [] and widened._opened[OUTSIDE]
    assert seen == [[0], [1]] and not any(widened._opened[unit] for unit in widened.units)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(stored) or [])


def test_every_parameter_is_in_one_unit() -> None:
    stored, _ = pair("qwen3")
    widened = Widened(stored)
    units = [p for unit in widened.units for p in widened.parameters(unit)]
    assert len(units) == len(set(units)) and set(units) == set(stored.parameters())
    assert [name for name, p in stored.named_parameters() if p in set(widened.parameters(OUTSIDE))] == [
        "model.embed_tokens.weight",  # the head's as well
        "model.norm.weight",
    ]
    first, second = blocks_of(stored) or []
    second.mlp = first.mlp
    shared = Widened(stored)
    assert {*first.mlp.parameters()} <= {*shared.parameters(OUTSIDE)}


def test_a_block_that_fails_is_closed() -> None:
    stored, _ = pair("llama")
    widened = Widened(stored)
    stored.model.layers[1].mlp.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError), torch.no_grad(), widened.forward():
        stored(input_ids=IDS)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_opened_twice_is_closed_by_the_second() -> None:
    stored, _ = pair("llama")
    widened, norm = Widened(stored), stored.model.norm.weight
    narrow = norm.data
    with widened.opened(OUTSIDE):
        with widened.opened(OUTSIDE):
            wide = norm.data
        assert norm.data_ptr() == wide.data_ptr() and norm.dtype == torch.float32
        norm.data.zero_()  # what is done to the copy is dropped
    assert norm.data_ptr() == narrow.data_ptr() and bool(norm.any())


def test_gradients_are_taken_off_first() -> None:
    stored, _ = pair("llama")
    widened = Widened(stored)
    widened.open(OUTSIDE)
    stored.model.norm.weight.grad = torch.ones_like(stored.model.norm.weight)
    with pytest.raises(AssertionError, match="taken off"):
        widened.close(OUTSIDE)
    stored.model.norm.weight.grad = None
    widened.close(OUTSIDE)


def test_by_hand_a_forward_pass_opens_nothing() -> None:
    stored, _ = pair("llama")
    widened = Widened(stored)
    with widened.manual(), widened.forward():
        assert not any(widened._opened[unit] for unit in widened.units)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_find_what_they_find_of_the_fp32_model(family: str) -> None:
    stored, wide = pair(family)
    found, wanted = RowModel(stored, adds_gradients=True, widened=Widened(stored)), RowModel(wide, adds_gradients=True)
    assert found.tuned is not None and wanted.tuned is not None and found.tuned.replaced == wanted.tuned.replaced
    for name in ("packs", "shares", "trims", "why"):
        assert getattr(found, name) == getattr(wanted, name)
    assert found.head is not None and wanted.head is not None and found.head[2:] == wanted.head[2:]
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
